import itertools
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_jax.data import generate_reasoning_gym, read_problems
from sapo_jax.data.sources import IRREPRODUCIBLE
from sapo_jax.errors import DataError
from sapo_jax.rewards import VERIFIERS
from sapo_jax.rewards.allowlist import REASONING_GYM_TASKS
from sapo_jax.rewards.registry import grade

KNOWN = ("math", "exact")
ROWS = [
    {
        "prompt": "1 + 1 =",
        "answer": "2",
        "verifier": "exact",
        "metadata": {"level": 1, "tags": ["a", "b"]},
    },
    {"prompt": " 2 + 2 =\n", "answer": "4", "verifier": None, "metadata": None},
    {
        "prompt": "ünïcödé <|im_end|> {{ 7 }}",
        "answer": "✓",
        "verifier": "math",
        "metadata": {"level": 3, "tags": []},
    },
]


@pytest.fixture
def write(tmp_path):
    """write(text or bytes or rows): the path of a JSONL file."""

    def to_file(content, name="rows.jsonl"):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return to_file


def test_jsonl(write):
    problems = read_problems(write(ROWS), "math", KNOWN)
    assert [p.question for p in problems] == [row["prompt"] for row in ROWS]
    assert [p.answer for p in problems] == ["2", "4", "✓"]
    assert [p.verifier for p in problems] == ["exact", "math", "math"]
    assert [p.metadata for p in problems] == [ROWS[0]["metadata"], {}, ROWS[2]["metadata"]]


def test_parquet_gives_the_same(write, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=1)
    as_text = [{**row, "metadata": row["metadata"] and json.dumps(row["metadata"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(as_text), tmp_path / "text.parquet")
    expected = read_problems(write(ROWS), "math", KNOWN)
    assert read_problems(str(tmp_path / "rows.parquet"), "math", KNOWN) == expected
    assert read_problems(str(tmp_path / "text.parquet"), "math", KNOWN) == expected


def test_optional_and_further_fields_blank_lines_and_a_byte_order_mark(write):
    text = b'\xef\xbb\xbf{"prompt": "a", "answer": "b", "split": 3}\n\n   \r\n{"prompt": "c", "answer": "d"}'
    problems = read_problems(write(text), "math", KNOWN)
    assert [(p.question, p.answer, p.verifier, p.metadata) for p in problems] == [
        ("a", "b", "math", {}),
        ("c", "d", "math", {}),
    ]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "sky", "arguments": '{"city": null}'}}],
    },
    {"role": "tool", "content": "", "tool_call_id": "1"},
    {"role": "assistant", "content": "None.", "reasoning_content": "No weather."},
    {"role": "user", "content": " And tomorrow?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]


def test_conversations(write):
    rows = [
        {"prompt": TURNS, "answer": "a", "tools": TOOLS},
        {"prompt": [{"role": "user", "content": "a", "name": None}], "answer": "a", "tools": []},
        {"prompt": "a", "answer": "a", "tools": json.dumps(TOOLS)},
        {"prompt": TURNS[:2], "answer": "a", "tools": None},
        {"prompt": [TURNS[0] | {"content": " Be\nbrief. "}, TURNS[1]], "answer": "a"},
    ]
    path = write(rows)
    problems = read_problems(path, "math", KNOWN)
    assert [p.question for p in problems] == [" And tomorrow?\n", "a", "a", "Weather?", "Weather?"]
    assert problems[0].messages[3] == TURNS[3]
    assert problems[1].messages == [{"role": "user", "content": "a"}]
    assert [p.tools for p in problems] == [TOOLS, None, TOOLS, None, None]
    assert [p.where for p in problems] == [f"{path}:{i}" for i in range(1, 6)]
    keys = [p.conversation for p in problems]
    assert keys[1] == ""  # the question alone, whichever way it is written
    assert keys[3] == keys[4] and len(set(keys)) == 4


def test_conversations_in_parquet(write, tmp_path):
    rows = [
        {"prompt": TURNS, "answer": "a", "tools": json.dumps(TOOLS)},
        {"prompt": TURNS[:2], "answer": "b"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_problems(str(tmp_path / "rows.parquet"), "math", KNOWN) == read_problems(
        write(rows), "math", KNOWN
    )


def test_parquet_that_pads_json_is_refused(tmp_path):
    """Arrow gives all structs of a column the same fields: absent ones would come back as nulls."""
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 1}}]
    turn = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "b"},
    ]
    for i, row in enumerate([{"prompt": turn}, {"prompt": "a", "tools": [{"x": 1}, {"y": 1}]}]):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.Table.from_pylist([{**row, "answer": "a"}]), path)
        with pytest.raises(
            DataError,
            match=r"parquet:1: `tools` or `arguments` hold nulls; in Parquet, write them as",
        ):
            read_problems(str(path), "math", KNOWN)
    turn[1] = {"role": "assistant", "tool_calls": ["f"]}
    pq.write_table(
        pa.Table.from_pylist([{"prompt": turn, "answer": "a"}]), tmp_path / "text.parquet"
    )
    with pytest.raises(DataError, match=r"text\.parquet:1: .*must be an object with the `name`"):
        read_problems(str(tmp_path / "text.parquet"), "math", KNOWN)
    pq.write_table(pa.table({"prompt": [["a"]], "answer": ["b"]}), tmp_path / "list.parquet")
    with pytest.raises(
        DataError, match=r"list\.parquet:1: `prompt\[0\]` must be an object, not str"
    ):
        read_problems(str(tmp_path / "list.parquet"), "math", KNOWN)


def turn(role, content="x", **more):
    return {"role": role, "content": content, **more}


BAD_PROMPTS = [
    ([], "`prompt` has no user message"),
    (["a"], r"`prompt\[0\]` must be an object, not str \('a'\)"),
    (
        [turn("user"), turn("usr")],
        r"`prompt\[1\].role` must be one of system, developer, user, assistant, tool, not 'usr'",
    ),
    ([{"content": "x"}], r"`prompt\[0\].role` must be one of .*, not None"),
    ([turn(["user"])], r"`prompt\[0\].role` must be one of"),
    ([{"role": "user"}], r"`prompt\[0\].content` is missing"),
    ([turn("user", " ")], r"`prompt\[0\].content` is empty"),
    ([turn("user", 3)], r"`prompt\[0\].content` must be text, not int \(3\)"),
    (
        [turn("user", [{"type": "text", "text": "a"}])],
        r"`prompt\[0\].content` must be text, not list",
    ),
    ([turn("user", "\ud800")], r"`prompt\[0\].content` holds half of a surrogate pair"),
    (
        [turn("user", contents="x")],
        r"`prompt\[0\]` has the unknown key 'contents'; known are role, tool_calls, content",
    ),
    ([turn("user", name=3)], r"`prompt\[0\].name` must be text, not int"),
    ([turn("user"), {"role": "assistant"}], r"`prompt\[1\].content` is missing"),
    ([turn("system")], "`prompt` has no user message"),
    ([turn("user"), turn("assistant")], "`prompt` ends with an assistant message"),
    ([turn("user", tool_calls=[])], r"`prompt\[0\].tool_calls` stands in a message of the user"),
    ([turn("assistant", tool_calls={})], r"`prompt\[0\].tool_calls` must be a list, not dict"),
    (
        [turn("assistant", tool_calls=["f"])],
        r"`prompt\[0\].tool_calls\[0\]` must be an object with the `name`",
    ),
    (
        [turn("assistant", tool_calls=[{"function": {}}])],
        r"tool_calls\[0\]` must be an object with the `name`",
    ),
    (
        [turn("assistant", tool_calls=[{"name": "f", "arguments": [1]}])],
        r"tool_calls\[0\]` must have `arguments`",
    ),
    (
        [turn("assistant", tool_calls=[{"name": "\ud800", "arguments": ""}])],
        r"tool_calls` is not made of JSON values",
    ),
    (
        [turn("assistant", reasoning_content=[])],
        r"`prompt\[0\].reasoning_content` must be text, not list",
    ),
]
BAD_TOOLS = [
    ({}, "`tools` must be a list of JSON schemas, not {}"),
    (["f"], "`tools` must be a list of JSON schemas"),
    ([{}], "`tools` must be a list of JSON schemas"),
    ("[", "`tools` is not made of JSON values"),
    (3, "`tools` must be a list"),
    ([{"x": "\udfff"}], "`tools` is not made of JSON values: .* half of a surrogate pair"),
    (
        json.loads('[{"x":' + "[" * 200 + "]" * 200 + "}]"),
        "`tools` is not made of JSON values: .* nested too deeply",
    ),
]


@pytest.mark.parametrize("prompt, message", BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_conversations(write, prompt, message):
    path = write([{"prompt": "a", "answer": "b"}, {"prompt": prompt, "answer": "b"}])
    with pytest.raises(DataError, match=message) as caught:
        read_problems(path, "math", KNOWN)
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("tools, message", BAD_TOOLS, ids=range(len(BAD_TOOLS)))
def test_bad_tools(write, tools, message):
    path = write([{"prompt": "a", "answer": "b", "tools": tools}])
    with pytest.raises(DataError, match=message) as caught:
        read_problems(path, "math", KNOWN)
    assert str(caught.value).startswith(f"{path}:1: ")


BAD_LINES = {
    '{"prompt": "a"': "not JSON",
    "[1]": "not a JSON object but list",
    '"text"': "not a JSON object but str",
    '{"answer": "b"}': "`prompt` is missing",
    '{"prompt": "a"}': "`answer` is missing",
    '{"prompt": 3, "answer": "b"}': r"`prompt` must be text, not int \(3\)",
    '{"prompt": "a", "answer": true}': r"`answer` must be text, not bool \(True\)",
    '{"prompt": "a", "answer": ["42"]}': r"`answer` must be text, not list",
    '{"prompt": "a", "answer": 1e999}': r"`answer` must be text, not float \(inf\)",
    '{"prompt": "a", "answer": "b", "prompt": "c"}': "not JSON: the key 'prompt' is given twice",
    '{"prompt": "a", "answer": "b", "metadata": {"x": 1, "x": 1}}': "the key 'x' is given twice",
    '{"prompt": "a", "answer": "b", "metadata": "{\\"x\\": 1, \\"x\\": 2}"}': "`metadata` is not made of "
    "JSON values: the key 'x' is given twice",
    '{"prompt": " ", "answer": "b"}': "`prompt` is empty",
    '{"prompt": "\\ud800", "answer": "b"}': "surrogate",
    '{"prompt": "a", "answer": "b", "verifier": "maths"}': "`verifier` 'maths' is unknown; known are exact, math",
    '{"prompt": "a", "answer": "b", "verifier": ["math"]}': "`verifier` .* is unknown",
    '{"prompt": "a", "answer": "b", "metadata": [1]}': "`metadata` must be an object, not list",
    '{"prompt": "a", "answer": "b", "metadata": "{"}': "`metadata` is not made of JSON values",
    '{"prompt": "a", "answer": "b", "metadata": {"x": NaN}}': "not JSON: NaN is not a JSON value",
    '{"prompt": "a", "answer": "b", "metadata": {"x": 1e999}}': "`metadata` is not made of JSON values",
    "[" * 100000: "not JSON",
    '{"prompt": ' + "9" * 5000 + "}": "not JSON",
}


@pytest.mark.parametrize("line, message", BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_one_bad_row(write, line, message):
    path = write('{"prompt": "a", "answer": "b"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_problems(path, "math", KNOWN)
    assert len(caught.value.mistakes) == 1
    assert str(caught.value).startswith(f"{path}:3: ")


def test_bytes_that_are_not_text(write):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON: 'utf-8' codec"):
        read_problems(
            write(b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff", "answer": "b"}'),
            "math",
            KNOWN,
        )


def test_all_bad_rows_at_once_the_first_20_shown(write):
    rows = [{"prompt": "a", "answer": "b"} if i % 2 else {"prompt": i} for i in range(50)]
    with pytest.raises(DataError) as caught:
        read_problems(write(rows), "math", KNOWN)
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 mistakes in the data:"
    assert [int(line.split(":")[1]) for line in lines[1:21]] == list(range(1, 41, 2))
    assert lines[21:] == ["  ... and 5 more"]
    assert len(caught.value.mistakes) == 25


def test_bad_parquet(write, tmp_path):
    table = pa.table({"prompt": ["a", None, "c"], "answer": ["b", "b", ""]})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(
        DataError, match=r"bad\.parquet:2: `prompt` is missing\n.*bad\.parquet:3: `answer` is empty"
    ):
        read_problems(str(tmp_path / "bad.parquet"), "math", KNOWN)
    with pytest.raises(DataError, match="broken.parquet: not a readable Parquet file"):
        read_problems(write(b"PAR1 nonsense", "broken.parquet"), "math", KNOWN)
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "columns.parquet")
    with pytest.raises(
        DataError,
        match="columns.parquet: no column answer nor prompt; there are text. Name them in the",
    ):
        read_problems(str(tmp_path / "columns.parquet"), "math", KNOWN)
    binary = pa.table({"prompt": ["a"], "answer": ["b"], "metadata": [{"x": b"raw"}]})
    pq.write_table(binary, tmp_path / "binary.parquet")
    with pytest.raises(
        DataError, match=r"binary\.parquet:1: `metadata` is not made of JSON values"
    ):
        read_problems(str(tmp_path / "binary.parquet"), "math", KNOWN)


def test_missing_empty_and_unknown_files(write, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such file"):
        read_problems(str(tmp_path / "nowhere.jsonl"), "math", KNOWN)
    with pytest.raises(DataError, match="no rows"):
        read_problems(write("\n"), "math", KNOWN)
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.json or \.parquet"):
        read_problems(write("a,b", "rows.csv"), "math", KNOWN)


# ---------------------------------------------------------------- reasoning-gym


def take(count, name="chain_sum", seed=0, **options):
    return list(itertools.islice(generate_reasoning_gym(name, options, seed), count))


def test_generator_is_a_function_of_name_options_and_seed():
    problems = take(1500)  # more than one chunk
    assert problems == take(1500)
    assert len({p.question for p in problems}) > 1300  # chunks do not repeat each other
    other = {p.question for p in take(1500, seed=1)}
    assert (
        len(other & {p.question for p in problems}) < 200
    )  # neighbouring seeds are not shifted copies


@pytest.mark.parametrize(
    "name", ["chain_sum", "basic_arithmetic", "products", "gcd", "lcm", "gsm_symbolic", "letter_counting",
             "leg_counting", "decimal_arithmetic", "decimal_chain_sum", "pool_matrix"]
)  # fmt: skip
def test_problems_satisfy_their_verifier(name):
    options = {"precision": 6} if name == "decimal_arithmetic" else {}
    problems = [
        p
        for p in take(20, name, **options)
        if not (name == "gsm_symbolic" and p.answer.startswith("-"))
    ]
    for problem in problems:
        assert problem.verifier == "reasoning_gym"
        assert json.loads(json.dumps(problem.metadata)) == problem.metadata
        assert (
            grade(problem.verifier, problem.answer, problem.answer, problem.metadata).status == "ok"
        )
        wrong = grade(problem.verifier, "no idea", problem.answer, problem.metadata)
        assert wrong.status in ("wrong", "unparsable")
    assert "reasoning_gym" in VERIFIERS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REASONING_GYM_TASKS - IRREPRODUCIBLE))
def test_every_allowed_generator(name):
    for problem in take(5, name):
        assert (
            grade(problem.verifier, problem.answer, problem.answer, problem.metadata).status == "ok"
        )


def in_another_process(names, hash_seed):
    """The first problems of each generator, made in a process with another hash seed and another
    random state."""
    code = f"""
import dataclasses, itertools, json, random
from sapo_jax.data import generate_reasoning_gym
random.seed({hash_seed})
streams = [itertools.islice(generate_reasoning_gym(name, {{}}, 0), 5) for name in {sorted(names)}]
print("#", json.dumps([[dataclasses.asdict(p) for p in stream] for stream in streams]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.split("#", 1)[1]


def test_problems_do_not_depend_on_the_process():
    names = ["chain_sum", "basic_arithmetic", "gsm_symbolic", "letter_counting", "leg_counting"]
    assert in_another_process(names, 1) == in_another_process(names, 2)


@pytest.mark.slow
def test_no_allowed_problems_depend_on_the_process():
    names = REASONING_GYM_TASKS - IRREPRODUCIBLE
    assert in_another_process(names, 1) == in_another_process(names, 2)


@pytest.mark.parametrize("name", sorted(IRREPRODUCIBLE))
def test_generators_that_depend_on_the_process_are_refused(name):
    with pytest.raises(DataError, match="no run could be resumed"):
        generate_reasoning_gym(name, {}, 0)


def test_names_outside_the_allow_list():
    for name in ("countdown", "nonsense"):  # countdown's scorer executes the answer
        with pytest.raises(DataError, match=f"'{name}' is not on the allow-list: .*chain_sum"):
            generate_reasoning_gym(name, {}, 0)


def test_bad_options():
    with pytest.raises(DataError, match="has no option max_term, seed; it has .*max_terms"):
        generate_reasoning_gym("chain_sum", {"max_term": 3, "seed": 1, "min_terms": 2}, 0)
    with pytest.raises(
        DataError, match=r"refuses its options \{'min_terms': 9\}: max_terms must be"
    ):
        generate_reasoning_gym("chain_sum", {"min_terms": 9}, 0)
    with pytest.raises(DataError, match="refuses its options"):
        generate_reasoning_gym("chain_sum", {"min_terms": "two"}, 0)
