"""pool.py, process.py, worker.py: verdicts come in order, and nothing that one item does reaches
another."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sapo_jax.config import Rewards
from sapo_jax.errors import WorkerError
from sapo_jax.rewards import VERIFIERS, VerifierPool, process
from sapo_jax.rewards.numbers import read_number
from sapo_jax.rewards.pool import Progress
from sapo_jax.rewards.registry import Gold, check_gold
from sapo_jax.rewards.verifiers import BOUNDED, MAX_BOUNDED
from sapo_jax.types import Prompt, Verdict

HOSTILE = {"workers": 2, "deadline": 5.0, "memory_mb": 512, "plugins": ("hostile_verifiers",)}
PLUGINS = ("hostile_verifiers",)
RIGHT = Verdict("ok", 1.0)


def prompt(answer="", verifier="same", metadata=None, index=0):
    return Prompt(index, "text", (1,), "question", answer, verifier, "task", metadata or {})


def hostile(action, metadata=None):
    return action, prompt(verifier="hostile", metadata=metadata)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(**HOSTILE) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient():
    with VerifierPool(**{**HOSTILE, "deadline": 0.5}) as pool:
        yield pool


def pids_of(pool):
    return [worker._process.pid for worker in pool._workers if worker._process is not None]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_the_arguments_are_the_config_keys_with_their_defaults():
    parameters = inspect.signature(VerifierPool).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    keys = dataclasses.asdict(Rewards())
    del keys["overlong"]  # of the trainer: the punishment is added after the verdicts
    assert defaults == keys


# ---------------------------------------------------------------- verdicts


def test_verdicts_come_in_the_order_of_the_items(pool):
    seen = []
    items = [(str(i % 7), prompt(str(i % 5), index=i)) for i in range(200)]
    verdicts = pool.verify(items, progress=seen.append)
    assert [v.status for v in verdicts] == ["ok" if i % 7 == i % 5 else "wrong" for i in range(200)]
    assert seen == [Progress(i + 1, 200, timed_out=0) for i in range(200)]


def test_nothing_to_verify(pool):
    assert pool.verify([]) == []


@pytest.mark.parametrize(
    "action, status, reward, detail",
    [
        ("right", "ok", 1.0, ""),
        ("one", "ok", 1.0, ""),
        ("false", "wrong", 0.0, ""),
        ("half", "wrong", 0.5, ""),
        ("unparsable", "unparsable", 0.0, "nothing here"),
        ("raise", "error", 0.0, "KeyError: 'missing'"),
        ("sys.exit", "error", 0.0, "SystemExit: 0"),
        ("stdin", "error", 0.0, "EOFError"),
        ("nan", "error", 0.0, "returned nan, outside [0, 1]"),
        ("inf", "error", 0.0, "returned inf, outside [0, 1]"),
        ("two", "error", 0.0, "returned 2.0, outside [0, 1]"),
        ("negative", "error", 0.0, "returned -0.1, outside [0, 1]"),
        ("int", "ok", 1.0, ""),
        ("string", "error", 0.0, "returned str, not bool"),
        ("none", "error", 0.0, "returned NoneType, not bool"),
        ("list", "error", 0.0, "returned list, not bool"),
        ("print", "ok", 1.0, ""),  # what it prints is no reply
        ("sleep a little", "ok", 1.0, ""),
        ("environment", "ok", 1.0, ""),
        ("signals", "ok", 1.0, ""),
        ("os._exit", "error", 0.0, "the worker exited with code 0"),
        ("segfault", "error", 0.0, "killed by SIGSEGV"),
        ("abort", "error", 0.0, "killed by SIGABRT"),
        ("memory", "error", 0.0, "needs more than rewards.memory_mb = 512"),
    ],
)
def test_what_a_verifier_may_do(pool, action, status, reward, detail):
    (verdict,) = pool.verify([hostile(action)])
    assert (verdict.status, verdict.reward) == (status, reward)
    assert detail in verdict.detail


def test_details_are_cut_and_can_be_written(pool):
    (verdict,) = pool.verify([hostile("raise surrogate")])
    assert verdict.status == "error" and 300 < len(verdict.detail) <= 500
    assert verdict.detail.encode("utf-8").startswith(b"ValueError: ???")


@pytest.mark.parametrize(
    "returned, expected",
    [
        ({"status": "wrong", "reward": -0.5, "detail": "why"}, Verdict("wrong", -0.5, "why")),
        ({"status": "ok", "reward": 1}, Verdict("ok", 1.0)),
        ({"status": "timeout", "reward": 0.0}, Verdict("timeout", 0.0)),
        ({"status": "fine", "reward": 1.0}, "malformed"),
        ({"status": "ok", "reward": float("nan")}, "malformed"),
        ({"status": "ok", "reward": "1"}, "malformed"),
        ({"status": "ok", "reward": 1.0, "detail": None}, "malformed"),
    ],
)
def test_a_verifier_may_return_a_verdict(returned, expected):
    import hostile_verifiers  # noqa: F401  (registers it)

    from sapo_jax.rewards.registry import grade

    verdict = grade("hostile", "verdict", "", {"verdict": returned})
    if expected == "malformed":
        assert verdict.status == "error" and "malformed verdict" in verdict.detail
    else:
        assert verdict == expected


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("action", ["sleep", "spin", "regex", "close"])
def test_a_hang_is_a_timeout_and_touches_no_neighbour(impatient, action):
    items = [(str(i), prompt(str(i))) for i in range(40)]
    items[7] = items[8] = items[30] = hostile(action)
    verdicts = impatient.verify(items)
    for i, verdict in enumerate(verdicts):
        if i in (7, 8, 30):
            assert (verdict.status, verdict.reward) in [("timeout", 0.0), ("error", 0.0)]
            assert (
                verdict.status == "timeout" or action == "close"
            )  # it has closed its reply channel: it died
        else:
            assert verdict == RIGHT


@pytest.mark.parametrize("action", ["os._exit", "segfault", "memory", "hoard"])
def test_a_crash_touches_no_neighbour(pool, action):
    items = [(str(i), prompt(str(i))) for i in range(40)]
    items[0] = items[1] = items[20] = hostile(action)
    verdicts = pool.verify(items)
    status = (
        "ok" if action == "hoard" else "error"
    )  # a hoarder leaves too little memory for the next hoarder
    assert [v.status for v in verdicts] == [status if i in (0, 1, 20) else "ok" for i in range(40)]


def test_who_inherits_a_doomed_worker_is_tried_again():
    with VerifierPool(**{**HOSTILE, "workers": 1}) as pool:
        assert (
            pool.verify(
                [hostile("right"), hostile("die later"), hostile("pause"), hostile("right")]
            )
            == [RIGHT] * 4
        )
        pool.verify([hostile("die later")])
        time.sleep(0.5)  # now it dies while idle, before a verifier that it has yet to prepare
        assert pool.verify([("1", prompt("1", "numeric"))]) == [RIGHT]


def test_the_deadline_leaves_out_the_start_and_the_imports():
    """math-verify takes about a second to import; the deadline is far below that."""
    with VerifierPool(workers=2, deadline=0.25) as pool:
        assert pool.verify([("1/2", prompt("0.5", "math"))] * 4) == [RIGHT] * 4


def test_verifiers_only_import_what_they_need():
    with VerifierPool(workers=1, plugins=PLUGINS) as pool:
        pool.verify([("1", prompt("1"))])
        with open(f"/proc/{pids_of(pool)[0]}/maps") as maps:
            assert not {"numpy", "jaxlib", "sympy"} & set(maps.read().replace("/", " ").split())


# ---------------------------------------------------------------- many items at a time


def test_a_hang_in_the_middle_of_a_request_costs_its_own_verdict_alone():
    """One worker gets the first 64 of these at once; two hang, one dies, one garbles."""
    items = [(str(i), prompt(str(i))) for i in range(200)]
    items[20] = hostile("sleep")
    items[21] = hostile("os._exit")
    items[40] = hostile("garble")
    items[63] = hostile("spin")
    with VerifierPool(**{**HOSTILE, "deadline": 0.5, "workers": 1}) as pool:
        seen = []
        start = time.monotonic()
        verdicts = pool.verify(items, progress=seen.append)
        assert time.monotonic() - start < 30
    assert [verdicts[i].status for i in (20, 21, 40, 63)] == [
        "timeout",
        "error",
        "error",
        "timeout",
    ]
    others = [verdict for i, verdict in enumerate(verdicts) if i not in (20, 21, 40, 63)]
    assert others == [RIGHT] * 196
    assert seen[-1] == Progress(200, 200, timed_out=2)


def test_each_item_of_a_request_has_the_whole_deadline():
    """Six items of 0.3 s each are asked at once, with a deadline of 1 s."""
    with VerifierPool(**{**HOSTILE, "deadline": 1.0, "workers": 1}) as pool:
        items = [hostile("sleep a little")] * 6 + [("1", prompt("1"))] * 12
        assert pool.verify(items) == [RIGHT] * 18


def test_the_budget_ends_a_request_in_its_middle():
    """The items that have not begun are errors, and the worker that had them is gone."""
    settings = {**HOSTILE, "workers": 1, "batch_deadline": 1.0}
    with VerifierPool(**settings) as pool:
        pool.verify([hostile("right")])
        verdicts = pool.verify([hostile("pause")] * 20)
        statuses = [verdict.status for verdict in verdicts]
        assert statuses[:2] == ["ok"] * 2 and statuses[-1] == "error"
        assert "batch_deadline = 1 s is used up" in verdicts[-1].detail
        assert pool.verify([hostile("right")]) == [RIGHT]


def test_bounded_verifiers_need_no_worker():
    items = [("5", prompt("5", name)) for name in sorted(BOUNDED)] * 10
    items += [("6", prompt("5", name)) for name in sorted(BOUNDED)] * 10
    with VerifierPool(workers=2, max_chars=10**5) as pool:
        statuses = [verdict.status for verdict in pool.verify(items)]
        assert statuses == ["ok"] * 20 + ["wrong"] * 20
        assert pids_of(pool) == []
        # What is longer than their bound goes to a worker like everything else.
        long = "9 " * (MAX_BOUNDED // 2 + 1)
        assert pool.verify([(long, prompt(long, "exact"))]) == [RIGHT]
        assert len(pids_of(pool)) == 1


@pytest.mark.parametrize(
    "piece",
    [
        "9", "1,", "1,111", "1 111 ", "1/", "1.", ".1", "-", "$", r"\frac", r"\frac{", r"\frac{1}{",
        "10^", "10^{", "9**9", "1e9", "0.1\\overline{", "1 1/1 ", " ", "\u2212", r"1\,111", "\x00",
    ],
)  # fmt: skip
def test_bounded_verifiers_are_bounded(piece):
    """The longest answers that are graded in the trainer's process take milliseconds."""
    text = (piece * MAX_BOUNDED)[:MAX_BOUNDED]
    for answer in (text, f"7{text}", f"{text}7"):
        start = time.process_time()
        read_number(answer)
        assert time.process_time() - start < 0.1


def test_what_an_item_changes_in_its_process_is_put_back():
    """Working directory, environment, streams, warnings, limits, random numbers; not its module."""
    whole = ("surroundings are whole", {"folder": os.getcwd()})
    items = [hostile(*whole), hostile("change surroundings"), hostile(*whole), hostile(*whole)]
    items.append(hostile("kept in its module"))
    with VerifierPool(**{**HOSTILE, "workers": 1}) as pool:
        assert pool.verify([hostile("right")]) == [RIGHT]
        pid = pids_of(pool)
        assert pool.verify(items) == [RIGHT] * 5
        assert pids_of(pool) == pid  # in one and the same worker


# ---------------------------------------------------------------- gold answers


def test_gold_answers_are_checked_under_a_deadline():
    names = ["right", "sleep", "raise", "sys.exit", "os._exit", "unparsable", "right"]
    golds = [Gold("picky", name, {}) for name in names]
    golds += [Gold("numeric", "five", {}), Gold("numeric", "5", {}), Gold("same", "", {})]
    seen = []
    with VerifierPool(**{**HOSTILE, "deadline": 0.5, "workers": 1}) as pool:
        mistakes = pool.check_golds(golds, progress=seen.append)
    assert mistakes[0] is None and mistakes[6] is None
    assert mistakes[1].startswith("checking it takes longer than 0.5 s: write it in a simpler form")
    assert mistakes[2].startswith("its check has failed with KeyError: 'missing' (")
    assert mistakes[3].startswith("its check has failed with SystemExit: 0 (")
    assert "the worker exited with code 0" in mistakes[4]
    assert mistakes[5] == "nothing here"
    assert mistakes[7] == "the gold answer 'five' is not a number"
    assert mistakes[8:] == [None, None]
    assert seen[-1] == Progress(10, 10, timed_out=1)


@pytest.mark.parametrize(
    "metadata, answer, mistake",
    [
        ({}, "4", "the metadata is no entry of reasoning-gym"),
        (
            {"metadata": {"source_dataset": "countdown"}},
            "4",
            "'countdown' is not on the allow-list",
        ),
        ({"metadata": {"source_dataset": "chain_sum"}}, "4", None),
        ({"metadata": {"source_dataset": "gcd"}, "answer": "4"}, "4", None),
        ({"metadata": {"source_dataset": "word_ladder"}}, "4", "needs metadata['options']"),
    ],
)
def test_entries_of_reasoning_gym_in_files_are_checked(metadata, answer, mistake):
    found = check_gold(Gold("reasoning_gym", answer, metadata))
    if mistake is None:
        assert found is None
    else:
        assert mistake in found


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\ud800b",
        "\udfff" * 99,
        '{"verifier": "x"}\n{"prepare": 1}\n',
        "\r\n\u2028",
        "😀" * 999,
        "x" * 10**6,
    ],
    ids=range(7),
)
def test_any_text_arrives_whole(text):
    seen_by_verifier = text.encode("utf-8", "replace").decode()
    with VerifierPool(workers=1, max_chars=2 * 10**6, plugins=PLUGINS) as pool:
        golds = [f"[{seen_by_verifier}]", "[x]"]
        verdicts = pool.verify(
            [*((f"[{text}]", prompt(gold)) for gold in golds), ("y", prompt("y"))]
        )
    assert [v.status for v in verdicts] == ["ok", "wrong", "ok"]


def test_a_long_completion_with_a_short_answer_is_graded():
    thoughts = "word " * 10_000
    with VerifierPool(workers=1, max_chars=10, plugins=PLUGINS) as pool:
        verdicts = pool.verify([(thoughts + r"\boxed{42}", prompt("42"))])
    assert verdicts == [RIGHT]


def test_thoughts_that_the_prompt_opens_are_no_answer():
    thinking = dataclasses.replace(prompt("42"), text="Why?<think>\n")
    with VerifierPool(workers=1, plugins=PLUGINS) as pool:
        verdicts = pool.verify([("42", thinking), ("so</think>42", thinking)])
    assert [verdict.status for verdict in verdicts] == ["unparsable", "ok"]


@pytest.mark.parametrize(
    ("on_timeout", "status", "valid"), [("wrong", "timeout", True), ("mask", "error", False)]
)
def test_a_timeout_is_wrong_or_masked(on_timeout, status, valid):
    settings = {**HOSTILE, "deadline": 0.5, "workers": 1, "on_timeout": on_timeout}
    with VerifierPool(**settings) as pool:
        (verdict,) = pool.verify([hostile("sleep")])
    assert (verdict.status, verdict.reward, verdict.valid) == (status, 0.0, valid)


def test_many_items_that_hang_get_ever_less_time():
    """At the whole deadline they would wait for 12 * 1 s; a verdict in time restores it."""
    with VerifierPool(**{**HOSTILE, "deadline": 1.0, "workers": 1}) as pool:
        pool.verify([hostile("right")])
        verdicts = pool.verify([hostile("sleep")] * 12)
        assert {verdict.status for verdict in verdicts} == {"timeout"}
        waited = [float(verdict.detail.split()[-2]) for verdict in verdicts]
        assert waited[:4] == [1.0, 1.0, 1.0, 0.5] and sum(waited) < 4.1
        assert pool._leash.seconds("hostile") < 0.05
        pool._leash.note("hostile", timed_out=False)
        assert pool._leash.seconds("hostile") == 1.0


def test_a_batch_has_a_budget():
    settings = {**HOSTILE, "deadline": 0.5, "workers": 1, "batch_deadline": 0.2}
    with VerifierPool(**settings) as pool:
        verdicts = pool.verify([hostile("sleep")] * 3)
    assert [verdict.status for verdict in verdicts] == ["timeout", "error", "error"]
    assert "batch_deadline = 0.2 s is used up" in verdicts[1].detail


@pytest.mark.parametrize("action", ["garble", "garble with JSON", "garble without end"])
def test_what_a_verifier_writes_to_the_pipe_is_no_reply(action):
    with VerifierPool(**{**HOSTILE, "workers": 1}) as pool:
        verdicts = pool.verify([hostile("right"), hostile(action), hostile("right")])
    assert [verdict.status for verdict in verdicts] == ["ok", "error", "ok"]
    assert verdicts[1].reward == 0.0


def test_a_child_in_a_session_of_its_own_dies_too(tmp_path):
    pids = tmp_path / "pids"
    with VerifierPool(**{**HOSTILE, "workers": 1}) as pool:
        assert pool.verify([hostile("setsid", {"pid_file": str(pids)})]) == [RIGHT]
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in started))


def test_too_long_a_completion_is_not_run():
    with VerifierPool(workers=1, max_chars=10, plugins=PLUGINS) as pool:
        verdicts = pool.verify([("x" * 11, prompt("x" * 11)), (" " * 10**7, prompt("x"))])
        assert [v.status for v in verdicts] == ["unparsable"] * 2
        assert verdicts[0].detail == "11 characters; rewards.max_chars is 10"
        assert pids_of(pool) == []
        assert pool.verify([("x" * 10, prompt("x" * 10))]) == [RIGHT]


@pytest.mark.parametrize(
    "form, completion, verifier, status, reward",
    [
        ("all", "5", "numeric", "ok", 1.0),
        ("all", "five", "numeric", "unparsable", 0.0),
        ("all", " ", "numeric", "unparsable", 0.0),
        ("answer_tag", "<answer>5</answer>", "numeric", "ok", 1.25),
        ("answer_tag", "<answer>6</answer>", "numeric", "wrong", 0.25),
        ("answer_tag", "<answer>five</answer>", "numeric", "unparsable", 0.25),
        ("answer_tag", "5", "numeric", "unparsable", 0.0),
        ("answer_tag", "<answer></answer>", "numeric", "unparsable", 0.0),
        ("answer_tag", "<answer>raise</answer>", "hostile", "error", 0.0),
        ("boxed", r"so \boxed{5}", "numeric", "ok", 1.25),
        ("boxed", r"so \boxed{\frac{10}{2}}", "math", "ok", 1.25),
        ("boxed", "5", "numeric", "unparsable", 0.0),
        ("boxed", r"\boxed{half}", "hostile", "wrong", 0.75),
    ],
)
def test_extraction_and_format_reward(form, completion, verifier, status, reward):
    with VerifierPool(**{**HOSTILE, "workers": 1, "extract": form, "format_reward": 0.25}) as pool:
        (verdict,) = pool.verify([(completion, prompt("5", verifier))])
    assert (verdict.status, verdict.reward) == (status, reward)


def test_reasoning_gym_through_the_pool():
    import reasoning_gym

    entries = [
        json.loads(json.dumps(entry))
        for entry in reasoning_gym.create_dataset("chain_sum", seed=1, size=8)
    ]
    countdown = {"metadata": {"source_dataset": "countdown"}}
    items = [(e["answer"], prompt(e["answer"], "reasoning_gym", e)) for e in entries]
    items += [("0" + e["answer"] + "1", prompt(e["answer"], "reasoning_gym", e)) for e in entries]
    items += [("__import__('os').abort()", prompt("1", "reasoning_gym", countdown))]
    with VerifierPool(workers=2) as pool:
        verdicts = pool.verify(items)
    assert [v.status for v in verdicts] == ["ok"] * 8 + ["wrong"] * 8 + ["error"]
    assert [v.reward for v in verdicts] == [1.0] * 8 + [
        0.0
    ] * 9  # the scorer's own partial credit is not paid
    assert "'countdown' is not on the allow-list" in verdicts[-1].detail


# ---------------------------------------------------------------- mistakes


def test_an_unknown_verifier_is_named(pool):
    message = "problem 17 of task 'task' asks for the verifier 'exactly'.*did you mean 'exact'"
    with pytest.raises(ValueError, match=message):
        pool.verify([("1", prompt("1")), ("1", prompt("1", "exactly", index=17))])
    assert pool.verify([("1", prompt("1"))]) == [RIGHT]  # the pool lives on


def test_a_plugin_that_cannot_be_imported_is_named():
    with pytest.raises(
        ValueError, match="rewards.plugins: module 'no_such_plugin' cannot be imported"
    ):
        VerifierPool(plugins=("no_such_plugin",))


def test_a_verifier_that_only_the_trainer_knows(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "homemade", VERIFIERS["math"])
    with VerifierPool(workers=1) as pool:
        with pytest.raises(
            WorkerError,
            match="cannot prepare the verifier 'homemade'(.|\n)*belongs in rewards.plugins",
        ):
            pool.verify([("1", prompt("1", "homemade"))])
        with pytest.raises(RuntimeError, match="the verifier pool is closed"):
            pool.verify([("1", prompt("1"))])


_IN_WORKER = "import os, sys, time\nif 'sapo_jax.rewards.worker' in sys.orig_argv:\n"


def test_a_worker_that_cannot_start_shows_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "stillborn.py").write_text(
        _IN_WORKER + "    os.write(2, b'no licence')\n    os._exit(9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        WorkerError, match="cannot start .*: the worker exited with code 9\nno licence"
    ):
        VerifierPool(plugins=("stillborn",))


@pytest.mark.parametrize(
    "ending, error, message",
    [
        ("raise SystemExit(0)", ValueError, "module 'ending' cannot be imported .SystemExit: 0"),
        ("import os; os._exit(0)", WorkerError, "the worker exited with code 0"),
    ],
)
def test_a_plugin_that_ends_its_process_when_imported(
    tmp_path, monkeypatch, ending, error, message
):
    (tmp_path / "ending.py").write_text(ending)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message):
        VerifierPool(plugins=("ending",))


def test_a_worker_that_never_gets_ready(tmp_path, monkeypatch):
    (tmp_path / "sleepy.py").write_text(_IN_WORKER + "    time.sleep(99)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process, "START_SECONDS", 1.0)
    with pytest.raises(WorkerError, match="cannot start .*: no answer within 1 s"):
        VerifierPool(plugins=("sleepy",))


def test_too_little_memory_to_start_is_said():
    with VerifierPool(memory_mb=40) as pool:
        with pytest.raises(WorkerError, match=r"cannot (start|prepare).*rewards.memory_mb = 40"):
            pool.verify([("1", prompt("1", "math"))])


def test_metadata_must_be_json():
    with VerifierPool(workers=1, plugins=PLUGINS) as pool:
        with pytest.raises(
            ValueError, match="problem 3 of task 'task': its answer or metadata is not JSON"
        ):
            pool.verify([("1", prompt("1", metadata={"a": {1, 2}}, index=3))])


# ---------------------------------------------------------------- processes


def test_close_leaves_no_process(tmp_path):
    pids = tmp_path / "pids"
    with VerifierPool(**{**HOSTILE, "deadline": 0.5}) as pool:
        pool.verify([hostile("right", {"pid_file": str(pids)})] * 8)
        assert pool.verify([hostile("spawn", {"pid_file": str(pids)})])[0].status == "timeout"
        started = {int(pid) for pid in pids.read_text().split()}
        pool.verify([("1", prompt("1"))] * 50)
        started |= set(pids_of(pool))
    assert len(started) >= 3
    wait_until(lambda: not any(is_alive(pid) for pid in started))
    pool.close()  # again


_SCRIPT = """
import signal, sys
from sapo_jax.rewards import VerifierPool
from sapo_jax.types import Prompt

# A background job of a shell inherits that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    action, pid_file, deadline = sys.argv[1:]
    item = (action, Prompt(0, "t", (1,), "q", "", "hostile", "task", {"pid_file": pid_file}))
    plugins = ("hostile_verifiers",)
    with VerifierPool(workers=2, deadline=float(deadline), plugins=plugins) as pool:
        pool.verify([item] * 2)

main()
"""


def _run_until_busy(tmp_path, action, deadline, lines):
    script, pid_file = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(_SCRIPT)
    pid_file.touch()
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    arguments = [sys.executable, str(script), action, str(pid_file), str(deadline)]
    trainer = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)
    wait_until(lambda: pid_file.read_text().count("\n") == lines, 60)
    pids = [int(pid) for pid in pid_file.read_text().split()]
    assert trainer.poll() is None and all(is_alive(pid) for pid in pids)
    return trainer, pids


@pytest.mark.parametrize(
    "action, deadline, lines",
    [("sleep", 1000, 2), ("spin", 1000, 2), ("spawn", 1000, 4), ("regex", 1, 2)],
    ids=["sleep", "spin", "grandchildren", "holding the GIL"],
)
def test_no_orphans_when_the_trainer_is_killed(tmp_path, action, deadline, lines):
    trainer, pids = _run_until_busy(tmp_path, action, deadline, lines)
    trainer.kill()
    trainer.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_no_orphans_when_the_trainer_is_interrupted(tmp_path):
    trainer, pids = _run_until_busy(tmp_path, "sleep", 1000, 2)
    trainer.send_signal(signal.SIGINT)
    _, stderr = trainer.communicate(timeout=30)
    assert b"KeyboardInterrupt" in stderr and trainer.returncode != 0
    assert not any(is_alive(pid) for pid in pids)


def test_interrupts_are_not_for_the_workers(pool):
    pool.verify([hostile("right")] * 20)
    before = pids_of(pool)
    assert all(os.getpgid(pid) == pid != os.getpgid(0) for pid in before)
    assert pool.verify([hostile("right")] * 20) == [RIGHT] * 20
    assert pids_of(pool) == before
