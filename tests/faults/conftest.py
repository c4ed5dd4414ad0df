"""The tiny run of tests/training, for faults that need a whole run."""

from tests.training.conftest import tiny_config

__all__ = ["tiny_config"]
