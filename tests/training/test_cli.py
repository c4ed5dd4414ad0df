"""The command line as a user meets it."""

from __future__ import annotations

import json

import pytest
import torch

from sapo_jax.cli import main


@pytest.fixture(scope="module")
def run_folder(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", str(tiny_config), "train.steps=1", f"run_dir={folder}"]) == 0
    return folder


def test_five_planted_mistakes_are_all_listed(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"
        "objective: {name: sapo, tau_poss: 1.0}\n"  # unknown key
        "optimizer: {learning_rate: fast}\n"  # wrong type
        "rollout: {temperature: -1.0}\n"  # out of range
        "train: {mini_batches: 5}\n"  # 32 prompts do not divide by 5
        "advantage: {kind: groop}\n"  # not a member
    )
    assert main(["config", str(path)]) == 2
    listed = capsys.readouterr().err
    assert "5 problems" in listed
    for key in (
        "tau_poss",
        "optimizer.learning_rate",
        "rollout.temperature",
        "mini_batches",
        "advantage.kind",
    ):
        assert key in listed
    assert "tau_pos'" in listed and "'group'" in listed  # did you mean


def test_config_prints_and_compiles_nothing(tiny_config, capsys, monkeypatch):
    import jax

    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("config compiled something"))
    assert main(["config", str(tiny_config), "train.mini_batches=1"]) == 0
    out = capsys.readouterr()
    assert "total" in out.out and "FLOP" in out.out
    assert "tau sweep would be a no-op" in out.err  # the gate cannot act


def test_usage_errors_exit_2(tiny_config, tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    for argv in (
        ["frobnicate"],
        ["train", str(tiny_config), "--fast"],
        ["train", str(tiny_config), "steps"],
    ):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2


@pytest.mark.parametrize("command", ["train", "sft", "eval", "sample", "config"])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "CONFIG" in capsys.readouterr().out


def test_eval_of_a_run_folder(run_folder, capsys):
    assert main(["eval", str(run_folder), "evaluate.samples=3"]) == 0
    assert "rl step 1: avg@3" in capsys.readouterr().out
    row = json.loads((run_folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert row["held_out/samples"] == 24


def test_eval_repeats_the_runs_own_figure(run_folder, capsys):
    """Same checkpoint, same problems, same random numbers: the same held-out accuracy as in the run's summary."""
    assert main(["eval", str(run_folder)]) == 0
    row = json.loads((run_folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (
        row["held_out/avg"]
        == json.loads((run_folder / "summary.json").read_text())["held_out_after"]
    )


def test_sample_shows_completions(run_folder, capsys):
    assert main(["sample", str(run_folder), "--prompt", "3+2=", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("3+2=") == 2
    assert main(["sample", str(run_folder), "--greedy", "-n", "3"]) == 0
    assert capsys.readouterr().out.count("question") == 3


def test_export_of_a_run_folder(run_folder, tmp_path, capsys):
    """transformers takes it: the run's parameters, its byte tokenizer, its template. A full folder is refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    assert main(["export", str(run_folder), str(folder)]) == 0
    assert "rl step 1" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "3+2= é漢"
    assert (
        tokenizer(text).input_ids == list(text.encode())
        and tokenizer.decode(list(text.encode())) == text
    )
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "3+2="}], tokenize=False)
        == "3+2="
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 258
    assert (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) > 10_000
    )
    assert main(["export", str(run_folder), str(folder)]) == 1
    assert "new or empty" in capsys.readouterr().err
    assert main(["export", str(run_folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    ours, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "half"))
    assert half.dtype == torch.bfloat16 and torch.equal(
        ours.lm_head.weight.bfloat16(), half.lm_head.weight
    )


def test_training_from_an_exported_model_starts_where_it_ended(run_folder, tiny_config, tmp_path):
    """model.path: held-out accuracy before any step is what the run that was exported reached."""
    folder = tmp_path / "out"
    assert main(["export", str(run_folder), str(folder)]) == 0
    settings = [f"model.path={folder}", "cold_start.steps=0", "train.steps=1", "evaluate.every=0"]
    assert main(["train", str(tiny_config), *settings, f"run_dir={tmp_path}/again"]) == 0
    first, then = (
        json.loads((f / "summary.json").read_text()) for f in (run_folder, tmp_path / "again")
    )
    assert then["held_out_before"] == first["held_out_after"]


def test_eval_without_a_checkpoint_says_so(tiny_config, tmp_path, capsys):
    assert main(["eval", str(tiny_config), f"run_dir={tmp_path}/nothing"]) == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tiny_config, tmp_path, capsys):
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", str(tiny_config), f"run_dir={folder}"]) == 1
    assert "another process" in capsys.readouterr().err


def test_an_unreachable_learning_rate_stops_the_run(tiny_config, tmp_path, capsys):
    """Non-finite updates are skipped and counted; after max_nonfinite in a row the run ends with a reason."""
    settings = [
        "cold_start.optimizer.learning_rate=1e38",
        "train.max_nonfinite=2",
        f"run_dir={tmp_path}/run",
    ]
    assert main(["train", str(tiny_config), *settings]) == 1
    assert "learning_rate" in capsys.readouterr().err


def test_more_prompts_a_step_than_problems_is_one_clear_message(tiny_config, tmp_path, capsys):
    """56 problems remain for training, a step wants 64."""
    settings = ["rollout.prompts_per_step=64", "evaluate.every=0", f"run_dir={tmp_path}/run"]
    assert main(["train", str(tiny_config), *settings]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "56" in error and "64" in error
