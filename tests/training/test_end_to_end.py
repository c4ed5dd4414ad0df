"""Two steps of every configuration, and of the settings that no committed configuration uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sapo_jax.analysis.read import read_run_evidence
from sapo_jax.cli import main
from sapo_jax.config import load
from sapo_jax.diagnostics import finalize_evidence
from sapo_jax.diagnostics.glossary import lookup
from sapo_jax.training.loop import train
from tests.training.test_resume import digests, without_time

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = [
    "cold_start.steps=2", "cold_start.batch_size=8", "cold_start.optimizer.warmup_steps=0", "optimizer.warmup_steps=0",
    "train.steps=2", "rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.max_new_tokens=4", "data.held_out=8",
    "evaluate.samples=2", "evaluate.every=0", "evaluate.batch_prompts=8", "checkpoint.every=100",
]  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl. Every metric in them must be in the glossary."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in {name for row in found for name in row}:
        lookup(name)
    return found


# the others differ from it by their objective, model or data; replay: see test_routing_replay
MARKED = [p if p.stem == "quickstart" else pytest.param(p, marks=pytest.mark.slow) for p in CONFIGS]


@pytest.mark.parametrize("path", MARKED, ids=[path.stem for path in CONFIGS])
def test_every_config_runs_two_steps(path, stand_ins, tmp_path):
    overrides = [*SMALL, *stand_ins(path), f"run_dir={tmp_path}/run"]
    if "model: {path:" in path.read_text():
        overrides.append("data.max_prompt_tokens=256")
    summary = train(load(path, overrides))
    assert summary["rl_steps"] == 2
    assert 0 <= summary["held_out_before"] <= 1 and 0 <= summary["held_out_after"] <= 1
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "diagnostics.jsonl",
        "summary.json",
        "progress.png",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tb" / "rl").iterdir())
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == 2 and last["nonfinite/total"] == 0
    assert last["a2/breaches"] == 0 and "a2/variance_mean" in last
    # Without a preference in any group there is no gradient to have a share of.
    assert ("grad_share/gspo_clipped" in last) == (last["groups/no_signal_fraction"] < 1)
    if "moe" in path.stem:
        assert last["router/load_max"] >= 1
        assert ("router/replay_difference_mean" in last) == path.stem.endswith(("_r2", "_r3"))


SETTINGS = {
    "moe_kl_sampler_logp": [
        "model.num_experts=4", "model.router_aux_loss_coef=0.01", "loss.kl=k3", "loss.kl_coef=0.1",
        "train.old_logp=sampler", "train.micro_batch=4", "objective.name=dppo",
    ],
    "gspo_token_correction_epochs": [
        "objective.name=gspo", "objective.level=token", "loss.correction=truncated", "train.epochs=2",
    ],
    "cispo_dr_grpo": [
        "objective.name=cispo", "advantage.kind=leave_one_out", "loss.normalization=constant", "model.remat=full",
        "loss.correction=masked", "optimizer.schedule=cosine", "optimizer.weight_decay=0.1",
        "loss.sequence_mask.below=1e-4",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_run(name, tiny_config, tmp_path):
    overrides = SETTINGS[name]
    summary = train(load(tiny_config, [*overrides, "train.steps=2", f"run_dir={tmp_path}/run"]))
    assert summary["rl_steps"] == 2
    last = rows(tmp_path / "run")[-1]
    assert last["mismatch/max"] < 1e-4
    assert ("kl/reference_mean" in last) == ("loss.kl=k3" in overrides)
    assert ("sequence_mask/fraction" in last) == ("loss.sequence_mask.below=1e-4" in overrides)
    if "loss.kl=k3" in overrides:
        # resumed, the reference is still the policy that RL started from, and nothing of the log is lost
        train(load(tiny_config, [*overrides, "train.steps=3", f"run_dir={tmp_path}/run"]))
        assert [row["step"] for row in rows(tmp_path / "run") if row["stage"] == "rl"] == [
            0,
            1,
            2,
            3,
        ]
        assert [
            row["step"] for row in rows(tmp_path / "run") if row["stage"] == "cold_start"
        ] == list(range(1, 21))


@pytest.mark.slow
def test_diagnostics_are_written_as_often_as_asked_for(tiny_config, tmp_path):
    """What is written is what the metrics say; with 0 there is neither. A resumed run may change it: the parameters are
    the same, bit for bit, with and without."""
    settings = ["objective.name=gspo", "evaluate.every=0"]
    run = lambda folder, every, steps: train(
        load(
            tiny_config,
            [*settings, f"diagnostics.every={every}", f"train.steps={steps}", f"run_dir={folder}"],
        )
    )
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    run(whole, 2, 3)
    found = read_run_evidence(whole)
    (second,) = (row for row in rows(whole) if (row["stage"], row["step"]) == ("rl", 2))
    assert found.steps == [2] and (found.gates.tau_pos, found.gates.tau_neg) == (
        1.0,
        1.05,
    )  # a GSPO run, SAPO's gate
    expected = {name: float(x) for name, x in finalize_evidence(found.evidence[0]).items()}
    assert {name: second[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found.evidence[0].tokens.count.sum() == second["tokens/count"]

    run(changed, 0, 2)
    assert not {"a2/variance_mean", "effective_tokens/fraction"} & rows(changed)[-1].keys()
    assert not (changed / "diagnostics.jsonl").exists()
    assert main(["analyze", str(changed)]) == 1
    run(changed, 1, 3)
    assert read_run_evidence(changed).steps == [3]
    assert digests(changed, "rl", 3) == digests(whole, "rl", 3)
    other = lambda row: {
        k: x
        for k, x in row.items()
        if k not in expected and not k.startswith(("time/", "held_out/"))
    }
    assert [*map(other, rows(changed))] == [*map(other, rows(whole))]


MOE = [
    "model.num_experts=8", "optimizer.learning_rate=1e-2", "train.mini_batches=4", "train.row_tokens=32", "train.steps=2",
    "evaluate.every=0", "checkpoint.every=1",
]  # fmt: skip
REPLAY = {
    "r2": ["train.routing_replay=r2", "train.routing_on=device", "train.epochs=2", "train.micro_batch=1"],
    "r3": ["train.routing_replay=r3", "train.live_mismatch_every=2", "objective.name=gspo", "loss={kl: k3, kl_coef: 0.1}"],
    "r3_sampler_logp": ["train.routing_replay=r3", "train.old_logp=sampler", "model.mlp_only_layers=[0]"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["r3", *(pytest.param(n, marks=pytest.mark.slow) for n in REPLAY if n != "r3")]
)
def test_routing_replay(name, tiny_config, tmp_path):
    """Two steps; the second one again from the checkpoint of the first, with experts recorded anew, is bit-equal. The
    first update of a rollout replays what the router chooses, later ones drift from it."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = lambda folder: train(load(tiny_config, [*MOE, *REPLAY[name], f"run_dir={folder}"]))
    run(whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "rl" / "2")
    run(resumed)
    assert digests(resumed, "rl", 2) == digests(whole, "rl", 2) != digests(whole, "rl", 1)
    assert without_time(resumed) == without_time(whole)

    *_, first, second = rows(whole)
    sparse = (1,) if "model.mlp_only_layers=[0]" in REPLAY[name] else (0, 1)
    for row in (first, second):
        assert row["mismatch/max"] < 1e-4
        shares = {key: x for key, x in row.items() if key.startswith("replay_difference/")}
        assert shares.keys() == {f"replay_difference/layer_{i}" for i in sparse}
        assert 0 < max(shares.values()) == row["router/replay_difference_max"] < 1
        assert sum(shares.values()) / len(shares) == pytest.approx(
            row["router/replay_difference_mean"]
        )
    assert "mismatch/live_mean" not in first
    if name == "r3":
        assert (
            second["mismatch/live_mean"] <= second["mismatch/live_max"] < 1e-4
        )  # float32: the same experts


def test_rl_improves_the_tiny_policy(tiny_config, tmp_path):
    """Not only does it run: reward rises. Copying one digit, from a barely trained start."""
    settings = [
        "train.steps=30", "rollout.prompts_per_step=8", "rollout.group_size=8", "optimizer.learning_rate=3e-3",
        "evaluate={every: 0, samples: 8, batch_prompts: 8}", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    train(load(tiny_config, settings))
    reward = [
        row["reward/mean"]
        for row in rows(tmp_path / "run")
        if row["stage"] == "rl" and row["step"] > 0
    ]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.2
