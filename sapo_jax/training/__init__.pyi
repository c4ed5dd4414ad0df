from .evaluate import Evaluation, Evaluator
from .loop import train
from .random_streams import Stream, random_key
from .run import Run, open_run
from .step import RLStep, StepResult

__all__ = [
    "Evaluation",
    "Evaluator",
    "RLStep",
    "Run",
    "StepResult",
    "Stream",
    "open_run",
    "random_key",
    "train",
]
