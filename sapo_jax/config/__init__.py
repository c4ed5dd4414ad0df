"""Configuration: the schema (`schema.py`), its loading (`load.py`) and the checks across keys (`checks.py`)."""

from sapo_jax.config.schema import *  # noqa: F403
