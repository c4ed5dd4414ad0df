from . import figures, statistics, survival
from .arms import Arm, read_arms
from .collapse import Collapse, CollapseRules, find_collapse
from .curves import Curve, curves_of
from .phases import analyze
from .read import RunEvidence, read_diagnostics, read_metrics, read_run_evidence

__all__ = [
    "Arm",
    "Collapse",
    "CollapseRules",
    "Curve",
    "RunEvidence",
    "analyze",
    "curves_of",
    "figures",
    "find_collapse",
    "read_arms",
    "read_diagnostics",
    "read_metrics",
    "read_run_evidence",
    "statistics",
    "survival",
]
