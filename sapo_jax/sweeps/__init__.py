"""Sweeps: a sweep file -> its runs (`load.py`) -> their training (`launch.py`) -> their results
(`results.py`).

Imports no JAX: each run is trained by a process of its own, and a process that has started JAX on a
TPU would keep the others from it.
"""

from sapo_jax.sweeps.launch import status_lines, train_sweep
from sapo_jax.sweeps.load import Sweep, SweepRun, load_sweep
from sapo_jax.sweeps.results import read_manifest, result_rows

__all__ = [
    "Sweep",
    "SweepRun",
    "load_sweep",
    "read_manifest",
    "result_rows",
    "status_lines",
    "train_sweep",
]
