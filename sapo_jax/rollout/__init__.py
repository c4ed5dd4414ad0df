"""Rollouts: the jitted sampler, the rules it draws tokens by, and packed rows for the learner.

The names of the public face are in `__init__.pyi`. They are imported when they are first used, so
that `sapo_jax.rollout.cache_width` can be imported without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
