from .chips import CHIPS, parse_topology
from .dry_run import describe, flops, memory
from .planner import plan, rank_meshes, valid_meshes

__all__ = [
    "CHIPS",
    "describe",
    "flops",
    "memory",
    "parse_topology",
    "plan",
    "rank_meshes",
    "valid_meshes",
]
