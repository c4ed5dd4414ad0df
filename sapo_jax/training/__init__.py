"""The loop: one RL step, the cold start, evaluation, and a run with its parts.

The names of the public face are in `__init__.pyi`. They are imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
