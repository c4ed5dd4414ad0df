"""Configuration: its schema (`schema.py`), loading (`load.py`), checks across keys (`checks.py`).

Imports no JAX: a configuration is checked before anything heavy starts.
"""

from sapo_jax.config.advice import warnings
from sapo_jax.config.checks import check, verify, vocabulary_mistakes
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.load import diff, dump, load, load_dumped, load_file_or_run, with_vocabulary
from sapo_jax.config.objective import (
    CISPO,
    DPPO,
    GRPO,
    GSPO,
    SAPO,
    TOPR,
    VESPO,
    Bounds,
    Objective,
)
from sapo_jax.config.presets import PRESETS
from sapo_jax.config.pretrained import read_json_object, read_model_keys, to_hugging_face
from sapo_jax.config.schema import (
    Advantage,
    Checkpoint,
    ColdStart,
    Config,
    Data,
    Diagnostics,
    DynamicSampling,
    Evaluate,
    FileTask,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Overlong,
    ReasoningGymTask,
    Rewards,
    Rollout,
    SequenceMask,
    Task,
    Train,
    Yarn,
)
from sapo_jax.errors import ModelDirError

__all__ = [
    "CISPO",
    "DPPO",
    "GRPO",
    "GSPO",
    "PRESETS",
    "SAPO",
    "TOPR",
    "VESPO",
    "Advantage",
    "Bounds",
    "Checkpoint",
    "ColdStart",
    "Config",
    "ConfigError",
    "Data",
    "Diagnostics",
    "DynamicSampling",
    "Evaluate",
    "FileTask",
    "Loss",
    "Mesh",
    "Model",
    "ModelDirError",
    "Objective",
    "Optimizer",
    "Overlong",
    "Problem",
    "ReasoningGymTask",
    "Rewards",
    "Rollout",
    "SequenceMask",
    "Task",
    "Train",
    "Yarn",
    "check",
    "diff",
    "dump",
    "load",
    "load_file_or_run",
    "load_dumped",
    "read_json_object",
    "read_model_keys",
    "to_hugging_face",
    "verify",
    "vocabulary_mistakes",
    "warnings",
    "with_vocabulary",
]
