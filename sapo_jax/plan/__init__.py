"""What a run will take, before it runs: the dry run, and plans for a TPU that is not there.

- The dry run (`sapo-jax config`) is arithmetic on the configuration: `describe`, `flops`, `memory`.
- A plan (`sapo-jax plan`) says whether the run fits and what bounds it. The package's real programs
  are compiled for a TPU topology that need not exist on this machine:

      config -> mesh over the devices of a topology -> abstract parameters and batch
             -> jit, lower, compile                                        programs, compile
             -> memory, FLOPs, HBM bytes, collectives of the program       hlo, costs
             -> seconds by a roofline model                                roofline
             -> JSON and tables                                            report, tables

Names are imported when they are first used, so that the dry run starts without JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
