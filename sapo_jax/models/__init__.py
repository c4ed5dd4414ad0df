"""Policy models: Qwen3, dense and with experts, and the functional face of a model, `Policy`.

The names below are imported when they are first used (`__init__.pyi` lists them, for type checkers
too), so that `sapo_jax.models.size`, which is arithmetic alone, can be imported without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
