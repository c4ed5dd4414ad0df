"""Statistics of the update, made inside the jitted step, and what is read of them afterwards.

On the device, with JAX:

    tokens      ratio, gate, clip fraction, entropy of tokens by sign of A, for metrics.jsonl
    collect     the evidence for SAPO's assumptions A1 and A2, of one micro-batch
    collect_quadrants  its part by sign of A and side of r
    sequences   its part by sequence: variance of log r, gate gap
    binning     its histograms
    sequence_mask  how much the sequence mask leaves out
    vocabulary  the gradient on all logits of one position (SAPO, Eq. 9)

On the host, without JAX:

    evidence    what the evidence is, how several add up, and its scalars for metrics.jsonl
    quadrants   what its part by sign of A and side of r is, and its scalars
    gates       SAPO's two gates and the hard clips (they serve both sides)
    histograms  fixed bins, and quantiles of them
    rows        the evidence of a step as a row of diagnostics.jsonl, written and read
    bootstrap   means and intervals of few and noisy values
    glossary    what every logged metric means; README.md is made from it

The names of this package are loaded when they are first used, so that the commands which only read
files start without JAX. `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
