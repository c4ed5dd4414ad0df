"""`python -m sapo_jax.io.sink_process NAME RUN`: copies RUN/metrics.jsonl for wandb or trackio.

It goes on until its stdin is closed, sends the rest, and ends. RUN/sink_NAME.json keeps the
identity of the run there, and which row of each stage was handed over last: a resumed run goes on
with the rows after it. (Rows that a resumed run makes again are the same ones, so they are not sent
twice.) Imports no JAX.

Without `metrics.online` nothing leaves the machine: wandb works in its offline mode, into RUN/wandb
(`wandb sync` sends it later), and trackio keeps to its own folder. With it, the libraries' own
settings decide: `wandb login` and WANDB_*, TRACKIO_SPACE_ID and TRACKIO_*.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sapo_jax.config.yaml_core import parse_yaml
from sapo_jax.io.files import CONFIG, METRICS, write_atomically

SECONDS_BETWEEN_LOOKS = 1.0
# Environment variables that would have trackio send something somewhere.
TRACKIO_PLACES = (
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "TRACKIO_BUCKET_ID",
    "TRACKIO_DATASET_ID",
    "TRACKIO_WEBHOOK_URL",
)


class Library(Protocol):
    """The run in one of the libraries.

    It is made from the run's configuration, folder, name and identity, and from what was handed
    over before: the last step of each stage.
    """

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class Wandb:
    """The run of this identity in wandb, new or resumed."""

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        name: str,
        identity: str,
        sent: Mapping[str, int],
    ):
        mode = None
        if not config["metrics"]["online"]:
            mode = "offline"
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb  # pyrefly: ignore

        self._cold_start_steps = sent.get("cold_start", 0)
        self._run = wandb.init(
            project=config["metrics"]["project"],
            name=name,
            group=config["name"],
            id=identity,
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True
            ),
        )
        # The axes of the charts.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("cold_start/*", step_metric="cold_start/step")

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """wandb's own step may only grow, so it counts on from one stage to the next."""
        global_step = step
        if stage == "cold_start":
            self._cold_start_steps = max(self._cold_start_steps, step)
        else:  # its steps count from 0
            global_step += self._cold_start_steps + 1
        self._run.log(_named(stage, {"step": float(step), **metrics}), step=global_step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """The same in trackio, which knows a run by its name, and keeps the step of every row."""

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        name: str,
        identity: str,
        sent: Mapping[str, int],
    ):
        if not config["metrics"]["online"]:
            for variable in TRACKIO_PLACES:
                os.environ.pop(variable, None)
            os.environ["HF_HUB_OFFLINE"] = "1"
        import trackio  # pyrefly: ignore

        self._run = trackio.init(
            project=config["metrics"]["project"],
            name=f"{name}-{identity}",
            group=config["name"],
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._run.log(_named(stage, metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


LIBRARIES: dict[str, Callable[..., Library]] = {"wandb": Wandb, "trackio": Trackio}


def _named(stage: str, metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of RL keep their names; those of the cold start have that in front."""
    if stage == "cold_start":
        return {f"cold_start/{name}": value for name, value in metrics.items()}
    return metrics


class Copier:
    """Hands the rows of metrics.jsonl to a library, each once and in their order."""

    def __init__(self, sink_name: str, run_dir: Path):
        self._source = run_dir / METRICS
        self._state_file = run_dir / f"sink_{sink_name}.json"
        self._position = 0  # bytes of metrics.jsonl that were read
        state: dict[str, Any] = {"identity": os.urandom(4).hex(), "sent": {}}
        if self._state_file.exists():
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
        self._sent: dict[str, int] = state["sent"]  # the last step of each stage
        self._identity: str = state["identity"]
        config, _ = parse_yaml((run_dir / CONFIG).read_text(encoding="utf-8"))
        start = LIBRARIES[sink_name]
        self._library = start(config, run_dir, _run_name(config), self._identity, self._sent)
        self._save()

    def copy(self) -> None:
        """Hands over the whole rows that are new."""
        if not self._source.exists():
            return
        with self._source.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._position:  # it was cut back
                self._position = 0
            file.seek(self._position)
            whole_lines, newline, _ = file.read().rpartition(b"\n")
        if not newline:
            return
        for line in whole_lines.split(b"\n"):
            self._hand_over(json.loads(line))
        self._position += len(whole_lines) + 1
        self._save()

    def finish(self) -> None:
        self._library.finish()

    def _hand_over(self, row: dict[str, Any]) -> None:
        stage = row.pop("stage")
        step = int(row.pop("step"))
        if step <= self._sent.get(stage, -1):
            return
        # JSON has no NaN: such numbers are text in metrics.jsonl.
        metrics = {name: float(value) for name, value in row.items()}
        self._library.log(stage, step, metrics)
        self._sent[stage] = step

    def _save(self) -> None:
        state = {"identity": self._identity, "sent": self._sent}
        write_atomically(self._state_file, json.dumps(state) + "\n")


def _run_name(config: Mapping[str, Any]) -> str:
    """The name of the run's folder: in a sweep it says the seed too."""
    run_dir = config["run_dir"].format(name=config["name"], seed=config["train"]["seed"])
    return run_dir.rstrip("/").rpartition("/")[2]


def main(sink_name: str, run_dir: str) -> int:
    try:
        copier = Copier(sink_name, Path(run_dir))
        run_is_over = False
        while not run_is_over:
            readable, _, _ = select.select([sys.stdin], [], [], SECONDS_BETWEEN_LOOKS)
            run_is_over = bool(readable)  # nothing is ever written there: it is its end
            copier.copy()
        copier.finish()
    except Exception as error:  # the run says this line
        lines = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {lines[0]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
