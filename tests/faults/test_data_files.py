"""Problem files as the field has them, and rows that cannot both be right."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapo_jax.config import Data, FileTask
from sapo_jax.data import load_demonstrations, load_problems, load_tokenizer, read_problems
from sapo_jax.data.layouts import marked_answer, number_as_text
from sapo_jax.errors import DataError

BYTE = load_tokenizer("byte")
KNOWN = ("math", "exact")
BENCHMARKS = Path(__file__).parents[3] / "shared" / "benchmarks"  # beside the checkout

VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 6 times 7?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4", "split": "train"},
}
GSM8K = {"question": "Half of 48 and 48?", "answer": "48/2 = <<48/2=24>>24.\n24+48 = 72.\n#### 72"}
MATH_ARENA = {"problem_idx": 1, "problem": "Find $x$.", "answer": 70, "problem_type": ["Algebra"]}
AMC = {"id": 0, "problem": "How far?", "answer": 27.0, "question": "How far? (again)"}
MATH_500 = {"problem": "Convert.", "solution": "So $\\boxed{3}$.", "answer": "\\frac{1}{3}"}


@pytest.fixture
def write(tmp_path):
    """write(rows, name): the path of a file with these rows, in the format of its name."""

    def to_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return to_file


def read(path, columns=None, **options):
    """(problems, notices) of a file."""
    notices = []
    problems = read_problems(path, "math", KNOWN, columns=columns, notices=notices, **options)
    return problems, notices


def load(*tasks, held_out=2, **data):
    return load_problems(Data(tasks=tasks, held_out=held_out, **data), BYTE, KNOWN)


# ---------------------------------------------------------------- layouts of the field


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(
    "row, question, answer, taken",
    [
        (VERL, "What is 6 times 7?", "42", ": answer from `reward_model.ground_truth`"),
        (GSM8K, "Half of 48 and 48?", "72", "question`, of the answer what follows `####`"),
        (MATH_ARENA, "Find $x$.", "70", ": prompt from `problem`"),
        (AMC, "How far?", "27", ": prompt from `problem`"),
        (MATH_500, "Convert.", "\\frac{1}{3}", ": prompt from `problem`"),
        ({"prompt": "a", "answer": 0.5}, "a", "0.5", None),
    ],
    ids=["verl", "gsm8k", "matharena", "amc", "math500", "float"],
)
def test_layouts_are_detected_and_said(write, name, row, question, answer, taken):
    path = write([row, row], name)
    problems, notices = read(path)
    assert [(p.question, p.answer) for p in problems] == [(question, answer)] * 2
    if taken is None:
        assert notices == []
    else:
        assert len(notices) == 1
        assert notices[0].startswith(f"{path}: ") and notices[0].endswith(taken.lstrip(": "))


def test_what_verl_says_of_a_row_becomes_metadata(write):
    problems, _ = read(write([VERL]))
    assert problems[0].metadata == {
        "data_source": "math_dapo",
        "extra_info": {"index": "9a9b6eb4", "split": "train"},
    }


def test_columns_of_the_config_go_before_what_is_detected(write):
    rows = [{"prompt": "no", "answer": "no", "in": {"text": "yes"}, "out": '{"gold": 7}'}]
    problems, notices = read(write(rows), {"prompt": "in.text", "answer": "out.gold"})
    assert [(p.question, p.answer) for p in problems] == [("yes", "7")]
    assert "prompt from `in.text`, answer from `out.gold`" in notices[0]


def test_the_config_gives_columns_to_each_of_two_files(write):
    train = write([{"q": f"question {i}", "a": i} for i in range(4)])
    test = write([{"problem": f"test {i}", "answer": i} for i in range(3)], "test.json")
    task = FileTask(
        path=train,
        columns={"prompt": "q", "answer": "a"},
        held_out_path=test,
        held_out_columns={},
    )
    problems = load(task)
    assert [p.answer for p in problems.train["rows"]] == ["0", "1", "2", "3"]
    assert {p.question for p in problems.held_out} < {"test 0", "test 1", "test 2"}
    assert len(problems.notices) == 2


def test_a_column_that_is_not_there_names_those_that_are(write):
    with pytest.raises(
        DataError, match=r"jsonl:1: `prompt` is missing; the row has text, gold \(the"
    ):
        read(write([{"text": "a", "gold": "b"}]))
    with pytest.raises(DataError, match="`problem` is missing; the row has question, answer"):
        read(write([MATH_500, GSM8K]))
    with pytest.raises(DataError, match="no column answer; there are prompt, gold. Name them in"):
        read(write([{"prompt": "a", "gold": "b"}], "rows.parquet"))
    with pytest.raises(DataError, match="`a.b` is missing"):
        read(write([{"prompt": "x", "a": {"c": 1}}]), {"answer": "a.b"})


def test_a_row_without_the_mark_that_the_others_have(write):
    with pytest.raises(DataError, match=r"jsonl:2: `answer` does not end in a line `#### ...`"):
        read(write([GSM8K, {**GSM8K, "answer": "no mark"}]))


def test_responses_to_imitate_stay_whole(write):
    demonstrations = load_demonstrations(write([GSM8K]), Data(), BYTE, ())
    assert demonstrations[0].answer == GSM8K["answer"]


@pytest.mark.parametrize(
    "answer, text",
    [(27, "27"), (27.0, "27"), (-3, "-3"), (-0.0, "0"), (0.1, "0.1"), (1e300, "1e+300")],
)
def test_numbers_as_text(answer, text):
    assert number_as_text(answer) == text


def test_what_is_no_number_stays():
    assert number_as_text(True) is True
    assert number_as_text("1.0") == "1.0"
    assert number_as_text(float("inf")) == float("inf")


@pytest.mark.parametrize(
    "answer, marked",
    [
        ("x\n#### 72", "72"),
        ("x\n#### 1,234\n", "1234"),
        ("#### -5.5 ", "-5.5"),
        ("x\n#### (1,2)", "(1,2)"),
        ("#### 1\n#### 2", "2"),
        ("#### 1\nthen more", None),
        ("no mark", None),
        ("a #### 1", None),
        ("x\n####", None),
    ],
)
def test_marked_answers(answer, marked):
    assert marked_answer(answer) == marked


def test_a_directory_of_shards(write, tmp_path):
    for i in range(3):
        write([{"prompt": f"question {i}", "answer": i}], f"shards/part-{i}.jsonl")
    (tmp_path / "shards" / "README.md").write_text("x")
    (tmp_path / "shards" / ".hidden.jsonl").write_text("x")
    folder = str(tmp_path / "shards")
    problems, _ = read(folder)
    assert [p.answer for p in problems] == ["0", "1", "2"]
    assert problems[1].where == f"{folder}/part-1.jsonl:1"
    assert list(load(FileTask(path=folder + "/")).train) == ["shards"]
    write([VERL], "shards/part-4.parquet")
    with pytest.raises(DataError, match=r"files of several kinds \(.jsonl, .parquet\)"):
        read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file that ends in .jsonl or .json or .parquet"):
        read(str(tmp_path / "empty"))


def test_a_json_file_that_is_no_array(write):
    with pytest.raises(DataError, match="not one JSON array of rows but dict"):
        read(write({"data": []}, "rows.json"))
    with pytest.raises(DataError, match=r"rows\.json:2: not a JSON object but int"):
        read(write([VERL, 3], "rows.json"))


@pytest.mark.parametrize("text", ['{"prompt": "a", "prompt": "b"}', '{"m": {"x": 1, "x": 1}}'])
def test_a_key_twice_is_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not JSON: the key '\w+' is given twice"):
        read(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.json").write_text(f"[{text}]")
    with pytest.raises(DataError, match=r"rows\.json: not JSON: the key '\w+' is given twice"):
        read(str(tmp_path / "rows.json"))


def test_rows_with_images_are_refused_once(write):
    row = {"question": "How many?\n<image1>", "answer": "6", "image": "images/4.jpg"}
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: the row brings images in `image`"
    ) as caught:
        read(write([row, row]))
    assert len(caught.value.mistakes) == 1
    assert len(read(write([{**row, "image": None}]))[0]) == 1


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmark files are not here")
@pytest.mark.parametrize(
    "name, count, first",
    [
        ("aime24.jsonl", 30, "204"),
        ("aime25.jsonl", 30, "70"),
        ("amc23.jsonl", 40, "27"),
        ("math_500.jsonl", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("gsm8k_test.jsonl", 1319, "18"),
        ("gsm8k_train.jsonl", 7473, "72"),
    ],
)
def test_the_benchmarks_load_as_they_are(name, count, first):
    problems, notices = read(str(BENCHMARKS / name))
    assert len(problems) == count and problems[0].answer == first and len(notices) == 1
    loaded = load(FileTask(path=str(BENCHMARKS / name)), held_out=8, max_prompt_tokens=10_000)
    (report,) = loaded.report.values()
    assert report.read == count


# ---------------------------------------------------------------- one question, two answers


def test_two_answers_to_one_question_are_named(write):
    rows = [{"prompt": f"question {i}", "answer": i} for i in range(6)]
    path = write([*rows, {"prompt": "question 2", "answer": "22"}])
    with pytest.raises(DataError) as caught:
        load(FileTask(path=path))
    assert caught.value.mistakes == [
        f"data.tasks[0] (rows): {path}:7: the answer is '22', but the same question has the answer "
        f"'2' in {path}:3; keep the row that is right"
    ]
    report = load(FileTask(path=write([*rows, rows[2]]))).report["rows"]
    assert report.duplicates == 1


def test_two_answers_in_verls_layout(write):
    """Another `extra_info` is another row, but the question is the same."""
    other = {**VERL, "extra_info": {"index": "other"}}
    wrong = {**other, "reward_model": {"ground_truth": "43"}}
    with pytest.raises(DataError, match="jsonl:2: the answer is '43', but the same question has"):
        load(FileTask(path=write([VERL, wrong])))


def test_two_answers_in_two_files_are_said(write):
    """Files of one task, or of two: a notice names the rows, and the run goes on."""
    rows = [{"prompt": f"question {i}", "answer": str(i)} for i in range(8)]
    ours = write(rows, "ours.jsonl")
    theirs = write([{"prompt": "question 2", "answer": "22"}, *rows[3:7]], "theirs.jsonl")
    said = f"1 questions have other answers in another file: '22' in {theirs}:1, '2' in {ours}:3"
    two_tasks = load(FileTask(path=ours), FileTask(path=theirs))
    assert said in two_tasks.notices
    one_task = load(FileTask(path=ours, held_out_path=theirs))
    assert said in one_task.notices
    assert not any("other answers" in notice for notice in load(FileTask(path=ours)).notices)


@pytest.mark.parametrize(
    "change",
    [{"metadata": {"n": 2}}, {"prompt": "def f():\n  pass"}, {"verifier": "exact"}],
    ids=["metadata", "white space", "verifier"],
)
def test_problems_that_differ_in_little_are_different(write, change):
    row = {"prompt": "def f():\n    pass", "answer": "1", "metadata": {"n": 1}, "verifier": "math"}
    others = [{"prompt": f"question {i}", "answer": "0"} for i in range(30)]
    path = write([row, {**row, **change, "answer": "2"}, *others])
    problems = load(FileTask(path=path), held_out=1)
    report = problems.report["rows"]
    assert report.duplicates == 0
    prompts = [*problems.held_out, *problems.train["rows"]]
    indices = {prompt.index for prompt in prompts}
    assert len(indices) == len(prompts) == 32


# ---------------------------------------------------------------- held out and trained on


def test_a_system_message_hides_no_problem(write):
    """The same text, with the system message in the row, in the config, or nowhere."""
    brief = {"role": "system", "content": "Be brief."}
    kind = {"role": "system", "content": "Be kind."}
    held_out = write(
        [
            {"prompt": [brief, {"role": "user", "content": "question 0"}], "answer": "0"},
            {"prompt": "question 1", "answer": "1"},
            {"prompt": "question 2", "answer": "2"},
        ],
        "test.jsonl",
    )
    train = write(
        [
            {"prompt": "question 0", "answer": "0"},
            {"prompt": [kind, {"role": "user", "content": "question  1"}], "answer": "1"},
            {"prompt": [brief, {"role": "user", "content": "question 2"}], "answer": "2"},
            {"prompt": "question 3", "answer": "3"},
        ]
    )
    task = FileTask(path=train, held_out_path=held_out)
    for system_prompt in ("", "Be brief."):
        problems = load(task, held_out=3, system_prompt=system_prompt)
        assert [p.question for p in problems.train["rows"]] == ["question 3"]
        demonstrations = load_demonstrations(
            train, Data(system_prompt=system_prompt), BYTE, problems.held_out
        )
        assert [p.question for p in demonstrations] == ["question 3"]


def test_rendered_prompts_are_compared(write, tmp_path):
    """A template that shows the last message alone makes different conversations the same prompt."""
    template = tmp_path / "last.jinja"
    template.write_text("{{ messages | map(attribute='content') | join(' ') }}")
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    held_out = write([{"prompt": turns, "answer": "1"}], "test.jsonl")
    train = write([{"prompt": "a b c", "answer": "1"}, {"prompt": "d", "answer": "2"}])
    task = FileTask(path=train, held_out_path=held_out)
    problems = load(task, held_out=1, chat_template=str(template))
    assert [p.question for p in problems.train["rows"]] == ["d"]


# ---------------------------------------------------------------- Parquet


def _parquet_tables():
    """(table, what is said of it; None: it loads), of types that are no text."""
    import datetime
    import decimal

    import pyarrow as pa

    def table(prompt=("a",), answer=("1",), **columns):
        return pa.table({"prompt": pa.array(prompt), "answer": pa.array(answer), **columns})

    not_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    image = pa.array([[{"bytes": b"x", "path": None}]])
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "prompt", "answer"])
    return {
        "a list as prompt": (table(prompt=[["a"]]), "`prompt[0]` must be an object, not str"),
        "an object as prompt": (table(prompt=[{"a": "x"}]), "`prompt` must be text, not dict"),
        "a number as prompt": (table(prompt=[1]), "`prompt` must be text, not int"),
        "no value": (table(prompt=pa.nulls(1)), "`prompt` is missing"),
        "NaN": (table(answer=[float("nan")]), "`answer` must be text, not float"),
        "a truth value": (table(answer=[True]), "`answer` must be text, not bool"),
        "a decimal": (table(answer=[decimal.Decimal("1.5")]), "`answer` must be text, not Decimal"),
        "nanoseconds": (table(answer=pa.array([1], pa.timestamp("ns"))), "not a readable Parquet"),
        "a duration": (table(answer=pa.array([1], pa.duration("ns"))), "not a readable Parquet"),
        "bytes": (table(prompt=[b"a"]), "`prompt` must be text, not bytes"),
        "no UTF-8": (table(prompt=not_utf8), "not a readable Parquet file: UnicodeDecodeError"),
        "a map": (
            table(metadata=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))),
            "`metadata` must be an object, not list",
        ),
        "a time in metadata": (
            table(metadata=pa.array([{"t": datetime.datetime(2020, 1, 1)}])),
            "`metadata` is not made of JSON values",
        ),
        "images": (table(images=image), "the row brings images in `images`"),
        "one image": (table(image=[b"x"]), "the row brings images in `image`"),
        "no images": (table(images=pa.array([[]], pa.list_(pa.binary()))), None),
        "nested metadata": (table(metadata=pa.array([{"a": {"b": [[[1]]]}}])), None),
        "a dictionary": (table(prompt=pa.array(["a"]).dictionary_encode()), None),
        "no rows": (table().slice(0, 0), "the file holds no rows"),
        "no columns": (pa.table({}), "no column"),
        "a column twice": (twice, "the column prompt is there twice"),
    }


def test_columns_of_other_types_are_one_error_each(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    for name, (table, said) in _parquet_tables().items():
        pyarrow.parquet.write_table(table, path)
        if said is None:
            assert len(read(str(path))[0]) == 1, name
            continue
        with pytest.raises(DataError) as error:
            read(str(path))
        assert str(path) in str(error.value) and said in str(error.value), name
