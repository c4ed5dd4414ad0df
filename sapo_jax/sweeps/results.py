"""What a sweep's folder says: which runs it holds, which of them are finished, with what results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sapo_jax.config import Config, diff, load
from sapo_jax.config.resume import changed_keys
from sapo_jax.config.source import dump_yaml, parse_yaml
from sapo_jax.errors import RunError
from sapo_jax.io.files import last_row, write_atomically, write_csv
from sapo_jax.io.lock import claimed
from sapo_jax.sweeps.load import Sweep

MANIFEST, RESULTS = "manifest.yaml", "results.csv"
# What a run could go on with, but then its evaluations could not be compared with those of other runs.
COMPARED = ("evaluate.samples", "evaluate.temperature")
FINAL = (
    "reward/mean",
    "entropy/mean",
    "completion/length_mean",
    "kl/old_k3_mean",
    "grad_norm",
)  # of the last RL step


def is_begun(folder: Path) -> bool:
    return (folder / "config.yaml").exists()


def finished(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that has taken its `steps` RL steps."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary if summary["rl_steps"] == steps else None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not the summary of a run ({error!r}); remove it") from error


def _last_metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    try:
        return last_row(path)
    except ValueError as error:
        raise RunError(
            f"the last line of {path} is not a row of metrics ({error}); remove that line"
        ) from error


# ---------------------------------------------------------------- before anything starts


def check_folder(plan: Sweep) -> None:
    """Raises RunError if the folder is a run's, or holds runs of these names with other configurations."""
    if is_begun(plan.folder):
        raise RunError(
            f"{plan.folder} is the folder of a run; give the sweep another `folder` or `name`"
        )
    changed: dict[str, list[str]] = {}
    for run in plan.runs:
        if is_begun(run.folder) and (keys := _changed(run.folder, run.cfg)):
            changed.setdefault(", ".join(keys), []).append(run.name)
    if changed:
        lines = [f"  {', '.join(names)}: {keys}" for keys, names in changed.items()]
        raise RunError(
            f"{plan.folder} holds runs with other configurations than the sweep has now; different:\n"
            + "\n".join(lines)
            + "\nUndo that, remove the folders of these runs, or give the sweep another `folder`"
        )


def _changed(folder: Path, cfg: Config) -> list[str]:
    stored = load(folder / "config.yaml")
    # A run fills in the size of its tokenizer's vocabulary.
    model = dataclasses.replace(
        cfg.model, vocab_size=cfg.model.vocab_size or stored.model.vocab_size
    )
    cfg = dataclasses.replace(cfg, model=model)
    keys = changed_keys(stored, cfg) + [key for key in diff(stored, cfg) if key in COMPARED]
    last = _last_metrics(folder)
    if last.get("stage") == "rl" and last["step"] > cfg.train.steps:
        keys.append(f"train.steps (it has already taken {last['step']})")
    return keys


# ---------------------------------------------------------------- manifest, results


def write_manifest(plan: Sweep) -> str:
    """Writes manifest.yaml, and returns a line about runs that an earlier one had and this one has not, or ""."""
    entry = lambda run: {
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.cfg.train.steps,
        "values": run.values,
    }
    manifest = {
        "name": plan.name, "base": plan.base, "swept": list(plan.swept), "runs": {r.name: entry(r) for r in plan.runs}
    }  # fmt: skip
    with claimed(plan.folder, wait=True):
        before = read_manifest(plan.folder)["runs"] if (plan.folder / MANIFEST).exists() else {}
        write_atomically(plan.folder / MANIFEST, dump_yaml(manifest))
    gone = [
        name for name in before if name not in manifest["runs"] and is_begun(plan.folder / name)
    ]
    return f"no longer in the sweep, left alone: {', '.join(gone)}" if gone else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest, _ = parse_yaml(path.read_text(encoding="utf-8"))
        for run in manifest["runs"].values():
            run["arm"], run["seed"], run["steps"], run["values"]
        return manifest | {"swept": list(manifest["swept"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is not the manifest of a sweep ({error!r}); remove it and start the sweep"
        ) from error


def write_results(folder: Path) -> None:
    """results.csv anew, from the manifest and what the runs' folders hold: one row for each finished run."""
    with claimed(folder, wait=True):
        if rows := result_rows(folder):
            write_csv(folder / RESULTS, rows)
        else:
            (folder / RESULTS).unlink(missing_ok=True)


def result_rows(folder: Path) -> list[dict[str, str]]:
    """In the order of the manifest. Floats are written out in full."""
    manifest, rows = read_manifest(folder), []
    for name, run in manifest["runs"].items():
        if (summary := finished(folder / name, run["steps"])) is None:
            continue
        row = {"run": name, "arm": run["arm"]} | {
            key: run["values"].get(key) for key in manifest["swept"]
        }
        row |= {"seed": run["seed"]} | {key: summary.get(key) for key in ("objective", "rl_steps")}
        for when in ("before", "after"):
            low, high = summary.get(f"interval_{when}", (None, None))
            row |= {
                f"held_out_{when}": summary.get(f"held_out_{when}"),
                f"pass_{when}": summary.get(f"pass_{when}"),
            }
            row |= {f"interval_{when}_low": low, f"interval_{when}_high": high}
        row |= {key: summary.get(key) for key in ("held_out_problems", "k", "seconds")}
        last = _last_metrics(folder / name)
        rows.append(
            {
                key: _cell(value)
                for key, value in (row | {key: last.get(key) for key in FINAL}).items()
            }
        )
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
