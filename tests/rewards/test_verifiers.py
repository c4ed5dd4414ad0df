"""verifiers.py, as functions: what each says of (response, answer)."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from sapo_jax.rewards import VERIFIERS, Unparsable, register
from sapo_jax.rewards.registry import Gold, Verifier, check_gold, grade
from sapo_jax.types import Verdict


def status(name, response, answer, metadata=None):
    verdict = grade(name, response, answer, metadata or {})
    assert verdict.reward == (1.0 if verdict.status == "ok" else 0.0)
    return verdict.status


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        ("a b", "a b", "ok"),
        ("a \n\t b", " a b ", "ok"),
        ("A b", "a b", "wrong"),
        ("ab", "a b", "wrong"),
        ("a b c", "a b", "wrong"),
        ("a\x00b", "a\x00b", "ok"),
        ("a", " ", "error"),
        ("a", "", "error"),
    ],
)
def test_exact(response, answer, expected):
    assert status("exact", response, answer) == expected


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        ("1,234", "1234", "ok"),
        ("1234", "1,234", "ok"),
        ("1,234,567.50", "1234567.5", "ok"),
        ("3/4", "0.75", "ok"),
        ("0.50", ".5", "ok"),
        ("6/8", "3/4", "ok"),
        ("-3 / 4", "-0.75", "ok"),
        ("+5", "5", "ok"),
        ("\N{MINUS SIGN}5", "-5", "ok"),
        ("007", "7", "ok"),
        ("5.", "5", "ok"),
        ("1e3", "1000", "ok"),
        ("2.5E-1", "1/4", "ok"),
        (" 5 ", "5", "ok"),
        ("-0", "0", "ok"),
        ("0.1", "1/10", "ok"),  # exact: floats would do too, here they would not:
        ("9007199254740993", "9007199254740992", "wrong"),
        ("0.33333333333333333333", "1/3", "wrong"),
        ("6", "5", "wrong"),
        ("-5", "5", "wrong"),
        ("1,23", "123", "unparsable"),
        ("1,2345", "12345", "unparsable"),
        ("1/0", "5", "unparsable"),
        ("5 apples", "5", "unparsable"),
        ("5 5", "5", "unparsable"),
        ("--5", "5", "unparsable"),
        ("5%", "5", "unparsable"),
        ("nan", "5", "unparsable"),
        ("inf", "5", "unparsable"),
        ("1_000", "1000", "unparsable"),
        ("٣", "3", "unparsable"),  # digits of other scripts
        ("1e999999999", "5", "unparsable"),  # would fill the memory with its digits
        ("9" * 10_000, "5", "unparsable"),
        ("5\x00", "5", "unparsable"),
        ("5", "five", "error"),
        ("5", "1/0", "error"),
        ("5", "", "error"),
    ],
)
def test_numeric(response, answer, expected):
    assert status("numeric", response, answer) == expected


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        ("42", "42", "ok"),
        ("The answer is 42.", "42", "ok"),
        ("so we get 12 + 7 = 19", "19", "ok"),
        ("12 + 7 = 19", "19", "ok"),
        ("12 + 7 = 18", "19", "wrong"),
        ("The answer is 3*(4+5)", "27", "ok"),
        ("The answer is 2^3", "8", "ok"),
        (r"The final answer is $\boxed{\frac{1}{2}}$.", "0.5", "ok"),
        (r"\boxed{5}", "5", "ok"),
        (r"\frac{1}{2}", "1/2", "ok"),
        (r"\frac{1}{2}", "2", "wrong"),
        (r"\frac{1}{2}", r"$\frac{2}{4}$", "ok"),
        (r"\sqrt{8}", r"2\sqrt{2}", "ok"),
        ("x^2 + 2x + 1", "(x+1)^2", "ok"),
        ("1,234", "1234", "ok"),
        ("x = 5", "5", "ok"),
        (r"\{2, 1\}", r"\{1,2\}", "ok"),
        (r"\[ \frac{\pi}{2} \]", r"\pi/2", "ok"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "ok"),
        (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "wrong"),
        (r"50\%", r"$50\%$", "ok"),
        ("43", "42", "wrong"),
        ("I do not know", "42", "unparsable"),
        (r"$\frac{1}{$", "42", "unparsable"),
        ("\x00", "42", "unparsable"),
        ("42", "", "error"),
        ("42", r"\frac{1}{2", "error"),
        ("42", "north", "wrong"),  # a gold answer of words is compared as words
        ("42", "x + (", "error"),
    ],
)
def test_math(response, answer, expected):
    assert status("math", response, answer) == expected


def test_math_names_a_gold_answer_that_it_cannot_parse():
    assert r"gold answer '\\frac{1}{2'" in grade("math", "42", r"\frac{1}{2", {}).detail


@pytest.mark.parametrize(
    "name, gold, mistake",
    [
        ("math", r"\frac{1}{2", "neither mathematics that math-verify can parse nor words"),
        ("math", "x + (", "neither mathematics that math-verify can parse nor words"),
        ("math", " ", "empty"),
        ("numeric", "five", "'five' is not a number"),
        ("exact", " ", "empty"),
    ],
)
def test_bad_gold_answers_are_told_apart(name, gold, mistake):
    assert mistake in check_gold(Gold(name, gold, {}))


@pytest.mark.parametrize(
    "name, gold",
    [("math", "1e5"), ("math", "Yes"), ("math", "9^{9^{9}}"), ("numeric", "1/2"), ("exact", "a")],
)
def test_good_gold_answers_pass(name, gold):
    assert check_gold(Gold(name, gold, {})) is None


class _Boastful(float):
    """A float that says of itself that it lies in [0, 1]."""

    def __le__(self, other):
        return True

    __ge__ = __le__


@pytest.mark.parametrize(
    "result, status, reward",
    [
        (1, "ok", 1.0),
        (0, "wrong", 0.0),
        (np.bool_(True), "ok", 1.0),
        (np.float32(0.5), "wrong", 0.5),
        (np.float64(1.0), "ok", 1.0),
        (np.int64(1), "ok", 1.0),
        (np.array(1.0), "ok", 1.0),
        (2, "error", 0.0),
        (10**400, "error", 0.0),
        (np.float32("nan"), "error", 0.0),
        (_Boastful(100.0), "error", 0.0),
        (Verdict("ok", np.float32(1.0)), "ok", 1.0),
        (Verdict("ok", _Boastful(100.0)), "error", 0.0),
        ("1", "error", 0.0),
        (None, "error", 0.0),
        (np.ones(3), "error", 0.0),
    ],
    ids=str,
)
def test_what_counts_as_a_reward(monkeypatch, result, status, reward):
    monkeypatch.setitem(VERIFIERS, "given", Verifier(lambda *_: result, None))
    verdict = grade("given", "1", "1", {})
    assert (verdict.status, verdict.reward) == (status, reward)
    assert type(verdict.reward) is float
    if status == "error":
        assert "test_verifiers.py:" in verdict.detail


def test_an_error_names_file_and_line():
    import hostile_verifiers

    detail = grade("hostile", "raise", "", {}).detail
    assert detail.startswith("KeyError: 'missing'")
    assert f"{hostile_verifiers.__file__}:" in detail


def test_math_evaluates_no_text(monkeypatch):
    """Nothing goes to sympy's eval, whatever the text. As published, the library sends it 3*(4+5), and
    each number."""
    import sympy.physics.units  # noqa: F401  (evaluates constants of its own when it is imported)
    from sympy.parsing import sympy_parser

    VERIFIERS["math"].prepare()
    evaluated = []
    real = sympy_parser.eval_expr
    monkeypatch.setattr(
        sympy_parser, "eval_expr", lambda code, *rest: evaluated.append(code) or real(code, *rest)
    )
    sympy.Number("7")
    assert len(evaluated) == 1  # the trap works
    texts = """27|The answer is 3*(4+5)|answer: 2^3|the answer is (1)(2)|1/2|2.5|1e5|0,5|007|1,234.5|50%|$3*9$|= 5-2|-3
    |3!|5 cm|\u0663|__import__('os').abort()|$x=0.5$|$0.\\overline{3}$|$\\frac{1}{2}$|\\boxed{2.5}
    |$1 \\frac{1}{2}$|$50\\%$|$\\int_0^1 x dx$|$\\sum_{i=1}^3 i$|$\\text{os.abort()}$|$\\{1, 2.0\\}$|$[0, 1)$
    |$\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}$"""
    statuses = [status("math", text.strip(), text.strip()) for text in texts.split("|")]
    assert len(evaluated) == 1, evaluated
    assert statuses.count("ok") >= 24, statuses  # they were read


def test_the_private_names_that_are_replaced_for_that_exist():
    """Where this fails, math-verify or latex2sympy2 has moved a name that
    `mathematics._close_roads_to_eval` replaces. Find out what reads numbers and plain expressions
    there now, replace that, and see that the test above still traps what reaches eval."""
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parser

    assert hasattr(parser, "parse_latex_cached")
    assert hasattr(parser, "parse_expr_cached")
    assert hasattr(parser, "Number") and hasattr(latex2sympy2, "Number")
    assert hasattr(latex2sympy2._Latex2Sympy, "parse_number")


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
@pytest.mark.parametrize(
    "response",
    [
        "\x00" * 100,
        "{" * 300,
        "\\boxed{" * 100,
        "$" * 999,
        '{"status": "ok", "reward": 1.0}',
        "\n" * 1000,
    ],
    ids=range(6),
)
def test_adversarial_text_is_never_right(name, response):
    assert status(name, response, "5") in ("wrong", "unparsable")


def test_registering_a_taken_name_is_refused():
    with pytest.raises(
        ValueError, match="'exact' is registered twice: in sapo_jax.rewards.verifiers and in"
    ):
        register("exact")(lambda response, answer, metadata: True)
    assert VERIFIERS["exact"].function("a", "a", {}) is True


def test_a_module_may_be_reloaded():
    import hostile_verifiers

    importlib.reload(hostile_verifiers)
    assert VERIFIERS["hostile"].function is hostile_verifiers.hostile


def test_a_worker_starts_without_a_warning():
    """Python warns where the package has imported the module that `-m` is to run."""
    worker = [sys.executable, "-m", "sapo_jax.rewards.worker"]
    run = subprocess.run(
        worker, input="", capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert (run.stdout, run.stderr) == ("", "")


# ---------------------------------------------------------------- reasoning-gym


def _entry(task, index=0, **options):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, seed=11, size=20, **options)[index]
    return json.loads(json.dumps(entry, default=str))


@pytest.mark.parametrize(
    "task, response, expected",
    [
        ("chain_sum", "{answer}", "ok"),
        ("chain_sum", "{answer}.00", "ok"),
        ("chain_sum", "1{answer}", "wrong"),  # the scorer's floor for holding the digits
        ("gsm_symbolic", "-12345", "wrong"),  # 0.01
        ("gcd", "the answer is {answer}", "wrong"),
        ("prime_factorization", "many", "unparsable"),  # the scorer raises
        ("cryptarithm", "A=1", "wrong"),  # 0.01
        ("palindrome_generation", "aba", "wrong"),  # 0.05
        ("spell_backward", "{answer}!", "wrong"),  # 1.0000000000000002 at times
        ("word_sorting", "{answer}", "ok"),
    ],
)
def test_reasoning_gym(task, response, expected):
    entry = _entry(task)
    assert (
        status(
            "reasoning_gym", response.replace("{answer}", entry["answer"]), entry["answer"], entry
        )
        == expected
    )


@pytest.mark.parametrize(
    "task",
    ["countdown", "puzzle24", "simple_integration", "composite", "no_such_task", None, ["gcd"]],
)
def test_reasoning_gym_refuses_tasks_that_are_not_listed(task):
    verdict = grade("reasoning_gym", "1", "1", {"metadata": {"source_dataset": task}})
    assert verdict.status == "error"
    assert "allow-list" in verdict.detail or isinstance(task, list)


def test_reasoning_gym_refuses_an_entry_that_is_damaged():
    entry = _entry("tower_of_hanoi")
    entry["metadata"]["num_disks"] = 1
    verdict = grade("reasoning_gym", "1", entry["answer"], entry)
    assert verdict.status == "error" and "gold answer" in verdict.detail
    assert grade("reasoning_gym", "1", "1", {}).status == "error"


def test_reasoning_gym_scores_with_the_options_of_the_generator():
    """The tolerance of decimal_arithmetic is 10**-max_num_decimal_places: 3 places, unless the options
    say otherwise."""
    options = {"min_num_decimal_places": 6, "max_num_decimal_places": 6, "precision": 12}
    entry = _entry("decimal_arithmetic", **options)
    near = str(float(entry["answer"]) + 0.0005)
    assert (
        "needs metadata['options']" in grade("reasoning_gym", near, entry["answer"], entry).detail
    )
    assert status("reasoning_gym", near, entry["answer"], {**entry, "options": {}}) == "ok"
    assert status("reasoning_gym", near, entry["answer"], {**entry, "options": options}) == "wrong"
    assert (
        status("reasoning_gym", entry["answer"], entry["answer"], {**entry, "options": options})
        == "ok"
    )


def test_unparsable_is_not_an_error():
    with pytest.raises(Unparsable):
        VERIFIERS["numeric"].function("x", "1", {})
