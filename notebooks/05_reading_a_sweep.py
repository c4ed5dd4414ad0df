# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Reading a sweep
#
# `sapo-jax sweep FILE` trains arms (settings) with several seeds, `sapo-jax report FOLDER` draws
# their curves. This notebook reads such a folder: set the environment variable `SAPO_SWEEP` to
# yours, say `runs/temperature` of `sapo-jax sweep configs/sweeps/temperature.yaml` (the paper's
# arms, 9 runs of 4 minutes). Otherwise it makes a small one: SAPO, GRPO and GSPO with three seeds
# each, a policy of 20,000 parameters that learns to say the larger of two digits, in a temporary
# folder; 9 real runs, two to three minutes on two cores.

# %%
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import sapo_jax as sj
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean

plt.rcParams.update(
    {"figure.dpi": 80, "font.size": 11, "legend.frameon": False, "axes.titleweight": "bold"}
)
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

BASE = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
head_dim: 16,
        intermediate_size: 64, initializer_range: 0.1, rope_theta: 1.0e+4}
data:
  held_out: 20                         # of 100 problems
  max_prompt_tokens: 16
  chat_template: plain
  tasks: [{kind: file, path: problems.jsonl, verifier: exact}]
cold_start: {steps: 40, batch_size: 16, optimizer: {learning_rate: 5.0e-3}}
rollout: {prompts_per_step: 16, group_size: 8, max_new_tokens: 2}
optimizer: {learning_rate: 2.0e-3, b2: 0.99}
train: {steps: 40, mini_batches: 4}
evaluate: {every: 5, samples: 8, batch_prompts: 20}
checkpoint: {every: 40}
"""
SWEEP = """
base: base.yaml
folder: larger_digit
arms:
  sapo: {}
  grpo: {objective: {name: grpo}}
  gspo: {objective: {name: gspo}}
seeds: [0, 1, 2]
"""


def small_sweep(home):
    """The folder of a sweep that was made just now; what its command printed last."""
    lines = []
    for a in range(10):
        for b in range(10):
            problem = {"prompt": f"max({a},{b})=", "answer": str(max(a, b))}
            lines.append(json.dumps(problem) + "\n")
    (home / "problems.jsonl").write_text("".join(lines))
    (home / "base.yaml").write_text(BASE)
    (home / "sweep.yaml").write_text(SWEEP)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # That is: sapo-jax sweep sweep.yaml
    command = [sys.executable, "-m", "sapo_jax.cli", "sweep", "sweep.yaml"]
    done = subprocess.run(command, cwd=home, env=os.environ | cache, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return home / "larger_digit"


given = os.environ.get("SAPO_SWEEP")
folder = Path(given) if given else small_sweep(Path(tempfile.mkdtemp()))
arms, notes = sj.analysis.read_arms([folder])
colour_of = dict(zip((arm.label for arm in arms), COLOURS, strict=False))
arms_told = ", ".join(f"{arm.label} ({len(arm.runs)} seeds)" for arm in arms)
print(f"{folder.name}: {arms_told}", *notes, sep="\n")


def draw(axes, metric, title, percent=False):
    """Thin lines are seeds, the thick one is their interquartile mean.

    The band is its 95 % bootstrap interval, from three seeds on.
    """
    for curve in sj.analysis.curves_of(arms, [metric]):
        colour = colour_of[curve.arm]
        axes.plot(curve.step_T, curve.value_TN, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(curve.step_T, curve.iqm_T, color=colour, linewidth=2.5, label=curve.arm)
        if curve.interval_T2 is not None:
            low_T, high_T = curve.interval_T2.T
            axes.fill_between(curve.step_T, low_T, high_T, color=colour, alpha=0.12, linewidth=0)
    axes.set(title=title, xlabel="RL step")
    if percent:
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")


figure, panels = plt.subplots(1, 2, figsize=(14, 4.6), layout="constrained")
draw(panels[0], "held_out/avg", "Held-out accuracy", percent=True)
draw(panels[1], "reward/mean", "Training reward")
panels[0].legend(loc="lower right")
plt.show()

# %% [markdown]
# Each thin line is a run. The thick one is the interquartile mean over the seeds of an arm: the
# mean without the lowest and highest quarter (of three seeds, nothing is left out). The band is
# the 95 % bootstrap interval of that: seeds drawn with replacement (arXiv 2108.13264). Three
# seeds have few ways to be drawn, so it goes from the lowest to the highest, and is too narrow.
# Bands that overlap say that seeds differ as much as arms; so do not read a winner into them.
#
# ## One row per run
#
# `results.csv` in the sweep's folder has one row for each finished run: what was varied, held-out
# accuracy before and after RL with intervals over problems, and the last step's metrics.

# %%
with (folder / "results.csv").open() as file:
    results = list(csv.DictReader(file))
shown = (
    "run",
    "held_out_before",
    "held_out_after",
    "interval_after_low",
    "interval_after_high",
    "entropy/mean",
)
print(f"{'run':24s}" + "".join(f"{name:>21s}" for name in shown[1:]))
for row in results:
    print(f"{row['run']:24s}" + "".join(f"{float(row[name]):21.3f}" for name in shown[1:]))

# %% [markdown]
# ## Gains, seed by seed
#
# Arms of a sweep share their seeds, and a seed decides the start: the weights, the cold start,
# the order of problems. So compare within a seed: the gain over the cold start, and the
# difference of two arms with the same seed.

# %%
after = {(row["arm"], row["seed"]): float(row["held_out_after"]) for row in results}
before = {(row["arm"], row["seed"]): float(row["held_out_before"]) for row in results}
labels = list(dict.fromkeys(row["arm"] for row in results))
seeds = sorted({row["seed"] for row in results})
complete = [seed for seed in seeds if all((arm, seed) in after for arm in labels)]

figure, (gains, differences) = plt.subplots(1, 2, figsize=(14, 4.2), layout="constrained")
for x, arm in enumerate(labels):
    finished = [seed for seed in seeds if (arm, seed) in after]
    gain = np.array([after[arm, seed] - before[arm, seed] for seed in finished])
    colour = colour_of[arm]
    gains.plot(np.full(len(gain), x), gain, "o", color=colour, markersize=8, alpha=0.6)
    gains.hlines(interquartile_mean(gain), x - 0.2, x + 0.2, color=colour, linewidth=3)
gains.set_xticks(range(len(labels)), labels)
gains.set(title="Gain in held-out accuracy, one dot per seed", xlim=(-0.6, len(labels) - 0.4))
for x, arm in enumerate(labels[1:]):
    difference = np.array([after[arm, seed] - after[labels[0], seed] for seed in complete])
    low, high = bootstrap_interval(difference)
    mean = difference.mean()
    dots = {"color": colour_of[arm], "markersize": 8, "alpha": 0.6}
    differences.plot(np.full(len(difference), x), difference, "o", **dots)
    error = [[mean - low], [high - mean]]
    differences.errorbar(x + 0.15, mean, error, fmt="D", color="black", capsize=5)
    told = f"{arm} - {labels[0]}, {len(difference)} seeds: mean {mean:+.3f}"
    print(f"{told}, 95 % interval {low:+.3f} to {high:+.3f}")
differences.axhline(0, color="black", linewidth=0.8)
differences.set_xticks(range(len(labels) - 1), [f"{arm} - {labels[0]}" for arm in labels[1:]])
differences.set(
    title=f"After RL, against {labels[0]} with the same seed", xlim=(-0.6, len(labels) - 1.4)
)
for axes in (gains, differences):
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:+.0f} pts")
plt.show()

# %% [markdown]
# ## What explains it
#
# The same curves of any metric of `metrics.jsonl`: how far the updates drift from the policy that
# sampled, what part of the tokens a hard clip drops (SAPO: none), and what is left of the
# entropy.

# %%
figure, panels = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
draw(panels[0], "a1/abs_log_ratio_mean", "Mean |log r| (A1), nats")
draw(panels[1], "clip_fraction/mean", "Tokens whose gradient a clip drops", percent=True)
draw(panels[2], "entropy/mean", "Entropy, nats per token")
panels[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# `sapo-jax report FOLDER... --metric held_out/avg,entropy/mean` draws these without a notebook,
# also of several sweeps and of single runs together, and writes the numbers as `curves.csv` and
# `final.csv`.

# %%
if not given:
    gain = np.array([after[key] - before[key] for key in after])
    assert len(results) == 9 and gain.mean() > 0.1, gain
    helped = (gain > 0).sum()
    points = 100 * gain.mean()
    print(f"RL helped {helped} of {len(gain)} runs, by {points:.0f} points on average")
