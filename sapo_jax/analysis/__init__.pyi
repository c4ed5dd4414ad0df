from . import figures
from .curves import Arm, Curve, curves_of, read_arms
from .phases import analyze
from .read import RunEvidence, read_diagnostics, read_metrics, read_run_evidence

__all__ = [
    "Arm",
    "Curve",
    "RunEvidence",
    "analyze",
    "curves_of",
    "figures",
    "read_arms",
    "read_diagnostics",
    "read_metrics",
    "read_run_evidence",
]
