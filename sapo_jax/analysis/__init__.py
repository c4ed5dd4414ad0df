"""What people read after a run. Everything here works on files of a run's folder, without JAX.

    read     metrics and diagnostics of a run as columns; its evidence for A1 and A2
    phases   `sapo-jax analyze`: the evidence as a table over the phases of training
    figures  the panels and figures of that evidence
    curves   learning curves of the arms of a sweep, or of runs, over their seeds
    statistics, survival   tests, effect sizes and power of paired seeds; Kaplan-Meier curves
    collapse   whether a run has collapsed and when, by named rules
    report   `sapo-jax report`: these curves as a picture, CSV files and a table

The names of this package are loaded when they are first used; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
