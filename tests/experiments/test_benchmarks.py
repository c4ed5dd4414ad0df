"""The comparison with the peers, as far as it goes without them.

That is: the command line, the turns, the checks, the tables, the workload; and the other
benchmarks.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def module():
    return importlib.import_module


# ---------------------------------------------------------------- tables


def figures(job: str, who: str, seconds: float, peak_mb: float, new_tokens: int = 0) -> dict:
    return {
        "workload": "small",
        "job": job,
        "who": who,
        "seconds": seconds,
        "fastest": seconds,
        "runs": 5,
        "first": 1.0,
        "peak_mb": peak_mb,
        "built_mb": 1.0,
        "new_tokens": new_tokens,
        "others": 0.0,
    }


def test_ratios_are_to_the_fastest_peer_and_memory_also_to_the_leanest(module):
    measured = [
        figures("update", "ours", 2.0, 300),
        figures("update", "hf", 3.0, 900),
        figures("update", "trl", 5.0, 600),
    ]
    rows = [("small", "update"), ("small", "score")]
    text = module("peer_table").tables(measured, rows, ["tunix", "trl", "hf"])
    time, memory = (line for line in text.splitlines() if line.startswith("| small"))
    # There is no column for tunix, and no row for score.
    assert time == "| small | update | 2 | 5 | 3 | hf | 1.50x | 0.00 |"
    assert memory == "| small | update | 300 | 600 | 900 | 0.33 | 0.50 |"


def test_rollouts_show_tokens_per_second_and_missing_sides_stay_empty(module):
    measured = [figures("rollout", "hf", 4.0, 900, 3072), figures("update", "ours", 1.0, 10)]
    rows = [("small", "rollout"), ("small", "update")]
    text = module("peer_table").tables(measured, rows, ["hf"])
    time = [line for line in text.splitlines() if line.startswith("| small")][:2]
    assert time == [
        "| small | rollout |  | 4; 768/s | hf |  | 0.00 |",
        "| small | update | 1 |  |  |  | 0.00 |",
    ]


def test_a_row_measured_on_a_busy_machine_says_so(module):
    measured = [
        figures("update", "ours", 2.0, 1) | {"others": 0.1},
        figures("update", "hf", 3.0, 1) | {"others": 1.5},
    ]
    text = module("peer_table").tables(measured, [("small", "update")], ["hf"])
    assert "| small | update | 2 | 3 | hf | 1.50x | **1.50** |" in text


def test_a_row_of_the_table_is_of_one_run(module, tmp_path):
    table = module("peer_table")
    old = [figures("update", who, 1.0, 1) for who in ("ours", "hf", "trl")]
    old.append(figures("score", "hf", 1.0, 1))
    new = [figures("update", "ours", 2.0, 1), figures("update", "hf", 9.0, 1)]
    merged = table.merge(old, new)
    assert [(f["job"], f["who"], f["seconds"]) for f in merged] == [
        ("score", "hf", 1.0),
        ("update", "ours", 2.0),
        ("update", "hf", 9.0),
    ]
    table.write(tmp_path / "new" / "peers.csv", merged)
    assert table.read(tmp_path / "new" / "peers.csv") == merged
    assert table.read(tmp_path / "none.csv") == []


def test_one_and_two_devices_are_told_side_by_side(module, monkeypatch, tmp_path, capsys):
    devices = module("cpu_devices")
    calls = []
    loss = {"1": 1.0, "2": 1.0}  # by number of devices

    def runner(line, env):
        return line[-1], env["JAX_NUM_CPU_DEVICES"]

    def take_turns(start, results, runs, lock, progress):
        calls.append(([make() for make in start.values()], runs, lock))
        for n, measured in results.items():
            for seconds in (9.0, 2.0, 3.0, 4.0):  # the first is the warm-up
                evidence = {"loss": loss[n], "grad_norm": 1.0}
                answer = {"seconds": seconds / int(n), "peak_mb": 1000 * int(n)}
                measured.add(answer | {"evidence": evidence}, 0.0)

    monkeypatch.setattr(devices, "write_work", lambda *_: tmp_path / "workload.json")
    monkeypatch.setattr(devices, "Runner", runner)
    monkeypatch.setattr(devices, "take_turns", take_turns)
    devices.main(["small", "--jobs", "score,update", "--runs", "3"])
    assert calls == [([(job, "1"), (job, "2")], 3, None) for job in ("update", "score")]
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == [
        f"| small | {job} | 3 (1,000) | 1.5 (2,000) | 2.00 |" for job in ("update", "score")
    ]
    loss["2"] = 2.0
    with pytest.raises(SystemExit, match="did other work: loss 2"):
        devices.main(["small", "--jobs", "update"])
    for words in (["update"], ["small", "--jobs", "sing"], ["small", "--runs", "0"]):
        with pytest.raises(SystemExit, match="2"):
            devices.main(words)


# ---------------------------------------------------------------- the same work


def test_disagreements_are_found(module):
    disagreement = module("runner").disagreement
    logp = np.zeros((2, 3)).tolist()
    assert not disagreement({"logp": logp}, {"logp": (np.array(logp) + 9e-4).tolist()})
    assert "0.002" in disagreement({"logp": logp}, {"logp": (np.array(logp) + 2e-3).tolist()})
    step = {"loss": 1e-3, "grad_norm": 0.8}
    assert not disagreement(step, {"loss": 1.001e-3, "grad_norm": 0.8001})
    assert disagreement(step, {"loss": 2e-3, "grad_norm": 0.8})
    assert disagreement(step, step | {"grad_norm": 0.81})
    assert not disagreement({"new_tokens": [3, 4]}, {"new_tokens": [3, 4]})
    assert "new tokens" in disagreement({"new_tokens": [3, 4]}, {"new_tokens": [4, 3]})


def test_a_failed_or_different_side_is_reported(module):
    Measured = module("runner").Measured
    error = "the process ended with code 1:\nNo module named 'trl'"
    results = {
        "ours": Measured(evidence={"new_tokens": [1]}, seconds=[1.0], others=[0.0]),
        "hf": Measured(evidence={"new_tokens": [2]}, seconds=[1.0], others=[0.0]),
        "trl": Measured(error=error, seconds=[1.0], others=[0.0]),
    }
    compare = module("compare")
    assert compare.faults(results) == [
        "trl failed: No module named 'trl'",
        "hf did other work than ours: other numbers of new tokens",
    ]
    rows = compare.figures(("small", "rollout"), results)
    assert [row["who"] for row in rows] == ["ours", "hf"]


def test_the_environments_of_the_sides(module, monkeypatch, tmp_path):
    """A setting of the one who measures goes before ours."""
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    environment = module("compare").environment

    def devices(side: str, workload: str) -> str | None:
        return environment(side, workload, tmp_path).get("JAX_NUM_CPU_DEVICES")

    assert devices("ours", "small") == "2"
    assert devices("ours", "mid") == "1"
    assert devices("hf", "small") is None
    assert environment("vllm", "mid", tmp_path)["LD_PRELOAD"].endswith("vllm/lib/libiomp5.so")
    assert environment("hf", "mid", tmp_path)["PATH"] == "/bin"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    assert devices("ours", "small") == "4"


# ---------------------------------------------------------------- turns

RUNNER = """
import sys; sys.path.insert(0, {peers!r})
from worker import Job, serve
calls = []
def make(work):
    print("libraries may print what they like")
    def run():
        calls.append(1)
        if len(calls) > {runs}: raise ValueError("worn out")
        return len(calls)
    return Job(run, lambda found: {{"new_tokens": [found]}})
serve({{"rollout": make}})
"""


@pytest.fixture
def workload(module, tmp_path) -> Path:
    worker = module("worker")
    requests = {"tail": worker.Requests([[1], [2]], [5, 6, 7, 8])}
    work = worker.Work(
        name="small",
        model="none",
        prompts=[[1], [2]],
        group=2,
        completions=[[3]] * 4,
        old_logp=[[0.0]] * 4,
        advantages=[0.0] * 4,
        slots=2,
        clip=0.2,
        learning_rate=1e-6,
        max_grad_norm=1.0,
        requests=requests,
    )
    work.write(tmp_path / "workload.json")
    assert worker.Work.read(tmp_path / "workload.json") == work
    return tmp_path / "workload.json"


def test_the_workload_in_slots(module, workload):
    work = module("worker").Work.read(workload)
    assert work.requests["tail"].batches(work.slots) == [([[1], [1]], [5, 6]), ([[2], [2]], [7, 8])]
    assert work.sequences == [[1, 3], [1, 3], [2, 3], [2, 3]]


def test_runners_take_turns_and_one_that_breaks_does_not_stop_the_others(
    module, workload, tmp_path
):
    runner = module("runner")
    start = {}
    results = {}
    for side, good_runs in (("ours", 99), ("hf", 2)):
        file = tmp_path / f"{side}.py"
        file.write_text(RUNNER.format(peers=str(BENCHMARKS / "peers"), runs=good_runs))
        command = [sys.executable, str(file), str(workload), "rollout"]
        start[side] = functools.partial(runner.Runner, command)
        results[side] = runner.Measured()
    said = []
    runner.take_turns(start, results, 3, tmp_path / "lock", said.append)
    ours = results["ours"]
    assert len(ours.seconds) == 3 and ours.evidence == {"new_tokens": [1]} and not ours.error
    assert len(results["hf"].seconds) == 1 and "worn out" in results["hf"].error
    assert ours.peak_mb >= ours.built_mb > 1
    turns = [line.split(",")[0] for line in said if "run" in line or "warm-up" in line]
    assert turns[:4] == ["ours", "hf", "ours", "hf"]


def test_long_runs_are_repeated_less_often(module):
    Measured = module("runner").Measured
    assert not Measured(seconds=[40.0, 40.0]).enough and Measured(seconds=[40.0, 40.0, 40.0]).enough
    assert not Measured(seconds=[1.0] * 4).enough and Measured(error="broken").enough


# ---------------------------------------------------------------- command line


def test_a_subset_is_chosen(module):
    args = module("compare").parse(["--workloads", "mid,vocab", "--jobs", "score", "--peers", "hf"])
    assert args.rows == [("mid", "score"), ("vocab", "score")] and args.peers == ["hf"]
    assert module("compare").parse(["--peers", ""]).peers == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "tiny"], "unknown: tiny; there are small, mid, vocab, moe"),
        (["--peers", "hf,verl"], "unknown: verl; there are tunix, trl, hf, vllm"),
        (
            ["--workloads", "vocab", "--jobs", "tail64"],
            "no row has one of these workloads and jobs",
        ),
        (["--runs", "0"], "--runs: at least 1"),
    ],
)
def test_mistakes_of_the_command_line(module, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        module("compare").main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(module, tmp_path, capsys):
    (tmp_path / "tunix").mkdir()
    (tmp_path / "tunix" / ".installed").touch()
    words = ["--folder", str(tmp_path), "--workloads", "small", "--peers", "tunix,hf"]
    assert module("compare").main(words) == 1
    said = capsys.readouterr().out
    assert "not installed: torch; run install_peers.py torch" in said and "--peers 'tunix'" in said


def test_every_environment_is_pinned_and_nothing_in_it_is_for_gpus(module):
    install = module("install_peers")
    assert set(module("compare").PEERS.values()) == set(install.ENVIRONMENTS)
    for name in install.ENVIRONMENTS:
        text = (BENCHMARKS / "peers" / f"{name}.txt").read_text()
        lines = [line for line in text.splitlines() if line[0] != "#"]
        assert all(line.count("==") == 1 for line in lines)
        assert not any(line.startswith(("nvidia", "cuda")) for line in lines)


# ---------------------------------------------------------------- where the time goes


def test_instructions_are_told_apart(module):
    """A product of attention is told by its einsum; other products are of weights."""
    where = module("where_time_goes")

    def program(q_bkgh, k_bkht, x, w):
        return jnp.einsum("bkgh,bkht->bkgt", q_bkgh, k_bkht).sum(), jnp.sin(x @ w)

    shapes = ((4, 2, 2, 32), (4, 2, 32, 64), (128, 64), (64, 256))
    arrays = [jnp.ones(shape) for shape in shapes]
    text = jax.jit(program).lower(*arrays).compile().as_text()
    entry = text[text.index("ENTRY") :]
    kinds = [kind for name, kind in where.kinds(text).items() if f"%{name} = " in entry]
    assert kinds.count(where.ATTENTIONS) == 1
    assert kinds.count(where.WEIGHTS) == 1
    assert where.REST in kinds


# ---------------------------------------------------------------- how the cost grows


@pytest.mark.slow
def test_cost_of_twice_the_sequences(module):
    """Twice the micro-batches, in the same memory; the slopes in the picture are exponents."""
    scaling = module("scaling")
    points = {n: scaling.measure(tiny.DENSE, 128, n, repeats=1) for n in (8, 16)}
    for point in points.values():
        assert min(point.values()) > 0 and set(point) == set(scaling.QUANTITIES)
    assert points[16]["temporaries_mb"] < 1.2 * points[8]["temporaries_mb"]
    assert scaling.slope(np.array([1, 2, 4]), np.array([3, 12, 48])) == pytest.approx(2)

    rows = [{"axis": "sequences", "value": str(n)} | point for n, point in points.items()]
    figure = scaling.plot(rows)
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert len(figure.axes) == 3 and len(labels) == 5 and all("slope" in label for label in labels)
