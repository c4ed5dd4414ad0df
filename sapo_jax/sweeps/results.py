"""What a sweep's folder says: which runs it holds, which are finished, and their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sapo_jax.config import diff, load, with_vocabulary
from sapo_jax.config.resume import changes_of_cold_start, changes_that_forbid_resuming
from sapo_jax.config.yaml_core import dump_yaml, parse_yaml
from sapo_jax.errors import RunError
from sapo_jax.io.files import CONFIG, METRICS, SUMMARY, last_row, write_atomically, write_csv
from sapo_jax.io.lock import claimed
from sapo_jax.sweeps.load import Sweep, SweepRun

MANIFEST = "manifest.yaml"
RESULTS = "results.csv"

# A run could go on with other values of these, but then its evaluations could not be compared with
# those of other runs.
COMPARED = ("evaluate.samples", "evaluate.temperature")

# Metrics of the last RL step that are results too.
FINAL_METRICS = (
    "reward/mean",
    "entropy/mean",
    "completion/length_mean",
    "kl/old_k3_mean",
    "grad_norm",
)


# ---------------------------------------------------------------- one run's folder


def is_begun(folder: Path) -> bool:
    """Whether a run has been started in the folder."""
    return (folder / CONFIG).exists()


def read_summary(folder: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run that has taken its `steps` RL steps; None: it is not finished.

    Raises RunError where the file is damaged.
    """
    path = folder / SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        steps_taken = summary["rl_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not the summary of a run ({error!r}); remove it") from error
    if steps_taken != steps:
        return None
    return summary


def is_finished(run: SweepRun) -> bool:
    """Raises RunError as `read_summary`."""
    if run.is_cold_start:
        steps = str(run.cfg.cold_start.steps)
        # Orbax gives a checkpoint its name when it is complete.
        return (run.folder / "checkpoints" / "cold_start" / steps / "manifest").is_dir()
    return read_summary(run.folder, run.cfg.train.steps) is not None


def _last_metrics(folder: Path) -> dict[str, Any]:
    path = folder / METRICS
    try:
        return last_row(path)
    except ValueError as error:
        text = f"the last line of {path} is not a row of metrics ({error}); remove that line"
        raise RunError(text) from error


# ---------------------------------------------------------------- before anything starts


def check_folder(sweep: Sweep) -> None:
    """Raises RunError if the sweep cannot work in its folder.

    It is the folder of a run, or holds runs of these names with other configurations.
    """
    if is_begun(sweep.folder):
        text = f"{sweep.folder} is the folder of a run"
        raise RunError(f"{text}; give the sweep another `folder` or `name`")
    runs_with_changes: dict[str, list[str]] = {}
    for run in (*sweep.cold_starts.values(), *sweep.runs):
        if not is_begun(run.folder):
            continue
        changes = _changes(run)
        if changes:
            runs_with_changes.setdefault(", ".join(changes), []).append(run.name)
    if runs_with_changes:
        lines = [f"  {', '.join(names)}: {keys}" for keys, names in runs_with_changes.items()]
        raise RunError(
            f"{sweep.folder} holds runs with other configurations than the sweep has now;"
            " different:\n" + "\n".join(lines) + "\nUndo that, remove the folders of these runs,"
            " or give the sweep another `folder`"
        )


def _changes(run: SweepRun) -> list[str]:
    """The keys for which what is in the run's folder cannot go on as this run of the sweep."""
    folder = run.folder
    stored = load(folder / CONFIG)
    # A run fills in the size of its tokenizer's vocabulary.
    cfg = with_vocabulary(run.cfg, stored.model.vocab_size)
    if run.is_cold_start:
        return changes_of_cold_start(stored, cfg)
    changes = changes_that_forbid_resuming(stored, cfg)
    changes += [key for key in diff(stored, cfg) if key in COMPARED]
    last = _last_metrics(folder)
    if last.get("stage") == "rl" and last["step"] > cfg.train.steps:
        changes.append(f"train.steps (it has already taken {last['step']})")
    return changes


# ---------------------------------------------------------------- the manifest


def write_manifest(sweep: Sweep, threads: int = 0) -> str:
    """Writes manifest.yaml: the sweep, resolved.

    threads: of each run on CPU; 0: all.

    Returns a line about runs that an earlier manifest had and this one has not, or "".
    """
    manifest = {
        "name": sweep.name,
        "base": sweep.base,
        "swept": list(sweep.swept),
        "threads": threads,
        "cold_starts": {seed: run.name for seed, run in sweep.cold_starts.items()},
        "runs": {run.name: _manifest_entry(run) for run in sweep.runs},
    }
    runs_before: dict[str, Any] = {}
    with claimed(sweep.folder, wait=True):
        if (sweep.folder / MANIFEST).exists():
            runs_before = read_manifest(sweep.folder)["runs"]
        write_atomically(sweep.folder / MANIFEST, dump_yaml(manifest))
    gone = [
        name
        for name in runs_before
        if name not in manifest["runs"] and is_begun(sweep.folder / name)
    ]
    if not gone:
        return ""
    return f"no longer in the sweep, left alone: {', '.join(gone)}"


def manifest_threads(folder: Path) -> int | None:
    """The threads of each run, from an earlier manifest; None where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest, _ = parse_yaml(path.read_text(encoding="utf-8"))
    return manifest.get("threads")


def _manifest_entry(run: SweepRun) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.cfg.train.steps,
        "values": run.values,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The sweep that the folder holds: `name`, `base`, `swept` and, by name, `runs`.

    A run has its `arm`, `seed`, `steps` and `values` at the swept keys. Raises RunError where the
    file is not the manifest of a sweep.
    """
    path = folder / MANIFEST
    try:
        manifest, _ = parse_yaml(path.read_text(encoding="utf-8"))
        manifest["swept"] = list(manifest["swept"])
        for run in manifest["runs"].values():
            for key in ("arm", "seed", "steps", "values"):
                run[key]  # raises KeyError where it is missing
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{path} is not the manifest of a sweep ({error!r})"
        raise RunError(f"{text}; remove it and start the sweep") from error
    return manifest


# ---------------------------------------------------------------- results


def write_results(folder: Path) -> None:
    """Makes results.csv anew, with a row for each finished run; without any there is no file."""
    with claimed(folder, wait=True):
        rows = result_rows(folder)
        if rows:
            write_csv(folder / RESULTS, rows)
        else:
            (folder / RESULTS).unlink(missing_ok=True)


def result_rows(folder: Path) -> list[dict[str, str]]:
    """A row for each finished run, in the order of the manifest. Floats are written out in full."""
    manifest = read_manifest(folder)
    rows = []
    for name, run in manifest["runs"].items():
        summary = read_summary(folder / name, run["steps"])
        if summary is None:
            continue
        row = {"run": name, "arm": run["arm"]}
        for key in manifest["swept"]:
            row[key] = run["values"].get(key)
        row["seed"] = run["seed"]
        row["objective"] = summary.get("objective")
        row["rl_steps"] = summary.get("rl_steps")
        for when in ("before", "after"):
            low, high = summary.get(f"interval_{when}", (None, None))
            row[f"held_out_{when}"] = summary.get(f"held_out_{when}")
            row[f"pass_{when}"] = summary.get(f"pass_{when}")
            row[f"interval_{when}_low"] = low
            row[f"interval_{when}_high"] = high
        for key in ("held_out_problems", "k", "seconds"):
            row[key] = summary.get(key)
        last_step = _last_metrics(folder / name)
        for key in FINAL_METRICS:
            row[key] = last_step.get(key)
        rows.append({key: _cell(value) for key, value in row.items()})
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value)
