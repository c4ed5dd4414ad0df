"""Figure 3 of the SAPO paper, assumption A2: how much log r varies within a sequence, and how far the mean of the token
gates is from the gate at the sequence's mean. Measured on two tiny policies in training.

    python experiments/figure3_dispersion.py    about 4 minutes on two cores, or seconds once the runs are there

Writes results/figure3_dispersion.csv (per RL step), figure3_sequences.csv (500 sampled sequences of each run),
assumptions_phases.csv (the table of `sapo-jax analyze`), and figure3_dispersion.png. The runs, and what they are not:
experiments/assumption_runs.py.

Expected: D_i of the log gate is never above tau^2/4 Var_i, and close to it where Var_i is below 0.01, since there the
gate is a parabola. D_i of the real gate is not bound by it: it goes above where tokens have r well over 1.
"""

from __future__ import annotations

from assumption_runs import RESULTS, runs
from matplotlib.figure import Figure

from sapo_jax.analyze import Diagnosed, table, write_csv
from sapo_jax.diagnostics import finalize_evidence
from sapo_jax.diagnostics.figures import GAP, bound_panel, gap_panel, variance_panel

SEQUENCES = 500  # of each run, in figure3_sequences.csv


def per_step(found: dict[str, Diagnosed]) -> list[dict]:
    return [
        {"run": run, "step": step}
        | {name: float(x) for name, x in finalize_evidence(evidence).items() if name.startswith(("a1/", "a2/"))}
        for run, diagnosed in found.items()
        for step, evidence in zip(diagnosed.steps, diagnosed.evidence, strict=True)
    ]


def per_sequence(found: dict[str, Diagnosed]) -> list[dict]:
    """Evenly spaced over the sampled sequences with more than one token."""
    rows = []
    for run, diagnosed in found.items():
        samples = diagnosed.samples()
        several = (samples["length"] > 1).nonzero()[0]
        for i in several[:: max(1, len(several) // SEQUENCES)][:SEQUENCES]:
            values = {name: samples[name][i] for name in ("adv", "mean", "variance", "gap_log", "gap_real")}
            rows.append({"run": run, "length": int(samples["length"][i])} | {k: float(v) for k, v in values.items()})
    return rows


def plot(found: dict[str, Diagnosed]) -> Figure:
    figure = Figure(figsize=(15.5, 4.2 * len(found)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    for (variance, gap, bound), (run, diagnosed) in zip(figure.subplots(len(found), 3), found.items(), strict=True):
        variance_panel(variance, diagnosed, f"{run}: variance of log r in a sequence")
        gap_panel(gap, diagnosed, f"{run}: mean gate gap and its bound")
        bound_panel(bound, diagnosed.samples(), diagnosed.gates, f"{run}: {GAP} against its bound")
    return figure


def main() -> None:
    found = runs()
    write_csv(RESULTS / "figure3_dispersion.csv", per_step(found))
    write_csv(RESULTS / "figure3_sequences.csv", per_sequence(found))
    phases = [{"run": run} | row for run, diagnosed in found.items() for row in table(diagnosed)]
    write_csv(RESULTS / "assumptions_phases.csv", phases)
    plot(found).savefig(RESULTS / "figure3_dispersion.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
