"""What people read after a run. Everything here works on files of a run's folder, without JAX.

    read       metrics and diagnostics of a run as columns; its evidence for A1 and A2
    phases     `sapo-jax analyze`: the evidence as a table over the phases of training
    quadrants  its part by sign of A and side of r, as a table
    figures    the panels and figures of that evidence; of the quadrants: `quadrant_figures`
    report     `sapo-jax report`: what arms came to, as pictures, CSV files and tables; made of
    arms         which runs are seeds of one arm
    curves       learning curves of the arms over their seeds
    outcomes     one number of each run
    pairs        paired differences to a reference arm, with the tests of `statistics`
    collapse     whether a run has collapsed and when; `survival`, `arm_survival`: over runs
    grid         two swept keys

The names of this package are loaded when they are first used; `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
