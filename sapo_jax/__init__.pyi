from . import (
    analysis,
    config,
    data,
    diagnostics,
    hub,
    learner,
    models,
    objectives,
    plan,
    rewards,
    rollout,
    sweeps,
    training,
)
from .analysis.read import read_diagnostics, read_metrics
from .notebook import OpenPolicy, load_config, open_policy

__all__ = [
    "OpenPolicy",
    "analysis",
    "config",
    "data",
    "diagnostics",
    "hub",
    "learner",
    "load_config",
    "models",
    "objectives",
    "open_policy",
    "plan",
    "read_diagnostics",
    "read_metrics",
    "rewards",
    "rollout",
    "sweeps",
    "training",
]
