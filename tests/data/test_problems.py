import dataclasses
import json
from pathlib import Path

import pytest

from sapo_jax.config import Data, FileTask, ReasoningGymTask
from sapo_jax.data import load_problems, load_tokenizer
from sapo_jax.data.common import normalise_space
from sapo_jax.errors import DataError

BYTE = load_tokenizer("byte")
KNOWN = ("math", "exact")


def gym(size=400, weight=1.0, name="chain_sum", **options):
    return ReasoningGymTask(name=name, size=size, weight=weight, options=options)


def load(*tasks, held_out=32, **data):
    return load_problems(Data(tasks=tasks, held_out=held_out, **data), BYTE, KNOWN)


def questions(prompts):
    return {normalise_space(p.question) for p in prompts}


def everything(problems):
    return [*problems.held_out, *(p for prompts in problems.train.values() for p in prompts)]


def check(problems, held_out):
    """What must hold of any result."""
    trained = set().union(*(questions(prompts) for prompts in problems.train.values()))
    assert trained.isdisjoint(questions(problems.held_out))
    assert len(problems.held_out) == held_out
    prompts = everything(problems)
    assert len({p.index for p in prompts}) == len(prompts)
    assert all(0 <= p.index < 2**31 for p in prompts)
    for name, report in problems.report.items():
        mine = [p for p in problems.held_out if p.task == name]
        assert report.held_out == len(mine) == len(questions(mine))
        assert report.train == len(problems.train[name]) == len(questions(problems.train[name])) > 0
        assert report.read == sum(dataclasses.astuple(report)[1:])
        assert {p.task for p in problems.train[name]} == {name}


@pytest.fixture
def rows(tmp_path):
    """rows(prompts, name): the path of a JSONL file with these prompts.

    The answers are the positions of the prompts, where each first stands."""

    def write(prompts, name="rows.jsonl"):
        lines = [
            json.dumps({"prompt": prompt, "answer": str(prompts.index(prompt))})
            for prompt in prompts
        ]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    return write


def test_prompts_of_a_generator():
    problems = load(gym(), system_prompt="Be <|im_end|> brief.")
    check(problems, 32)
    prompt = problems.held_out[0]
    assert prompt.text == (
        f"<|im_start|>system\nBe <|im_end|> brief.<|im_end|>\n<|im_start|>user\n{prompt.question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [i for i in prompt.ids if i > 255] == [257, 258, 257, 258, 257]
    assert BYTE.decode(prompt.ids, skip_special=False) == prompt.text
    assert (prompt.task, prompt.verifier) == ("chain_sum", "reasoning_gym")
    assert prompt.metadata["metadata"]["source_dataset"] == "chain_sum"
    report = problems.report["chain_sum"]
    assert 350 < report.train <= 400
    assert (
        0.15 < (report.held_out + report.unused) / report.read < 0.35
    )  # the held-out side is a quarter


def test_deterministic_and_seeded():
    first, again, other = load(gym()), load(gym()), load(gym(), seed=1)
    assert first == again
    assert questions(first.held_out) != questions(other.held_out)


def test_the_held_out_set_does_not_depend_on_size():
    small, large = load(gym(size=100)), load(gym(size=900))
    assert small.held_out == large.held_out
    assert small.train["chain_sum"] == large.train["chain_sum"][: len(small.train["chain_sum"])]
    assert len(large.train["chain_sum"]) > 800


def test_a_question_stays_on_its_side_whatever_the_options_and_counts():
    """What one run trains on, another one with the same data.seed never evaluates."""
    options = {"max_terms": 2, "max_digits": 2}
    one = load(gym(size=4000, **options), held_out=16)
    two = load(gym(size=4000, max_terms=3, max_digits=2), gym(name="products"), held_out=400)
    assert questions(one.train["chain_sum"]) & questions(two.train["chain_sum"])  # they do overlap
    assert questions(one.train["chain_sum"]).isdisjoint(questions(two.held_out))
    assert questions(two.train["chain_sum"]).isdisjoint(questions(one.held_out))
    more = load(gym(size=4000, **options), held_out=64)
    assert more.held_out[:16] == one.held_out


def test_small_problem_spaces():
    one_digit = {"max_terms": 2, "max_digits": 1}
    problems = load(gym(size=3000, **one_digit), held_out=20)
    check(problems, 20)
    report = problems.report["chain_sum"]
    assert report.train + report.held_out + report.unused == 200  # 10 x 10 x {+, -}
    assert report.duplicates == report.read - 200
    with pytest.raises(DataError, match=r"data.tasks\[0\] \(chain_sum\): the generator gave 200 distinct problems in .*"
                       r"53 of them on the held-out side.*256 must be held out.*lower data.held_out"):  # fmt: skip
        load(gym(size=3000, **one_digit), held_out=256)


def test_held_out_is_split_by_weight():
    problems = load(gym(weight=3.0), gym(name="products", weight=1.0), held_out=32)
    check(problems, 32)
    assert {name: report.held_out for name, report in problems.report.items()} == {
        "chain_sum": 24,
        "products": 8,
    }
    with pytest.raises(DataError, match="data.held_out = 2 leaves none for products"):
        load(gym(weight=99.0), gym(name="products", weight=1.0), held_out=2)


def test_tasks_of_one_name_are_numbered(rows):
    path = rows([f"question {i}" for i in range(20)])
    problems = load(
        gym(max_terms=2),
        gym(max_terms=3),
        FileTask(path=path),
        FileTask(path=path, name="mine"),
        held_out=8,
    )
    assert list(problems.train) == ["chain_sum", "chain_sum-2", "rows", "mine"]
    check(problems, 8)


def test_disjoint_across_tasks(rows):
    """Two tasks with the same questions: what either holds out, neither trains on."""
    path = rows([f"question {i}" for i in range(30)])
    other = rows([f" question  {i}\n" for i in range(30)], "spaced.jsonl")
    problems = load(FileTask(path=path), FileTask(path=other, weight=2.0), held_out=9)
    check(problems, 9)
    assert (
        problems.report["rows"].unused == 3
    )  # of the six that `spaced` holds out, three are its own as well
    assert problems.report["spaced"].unused == 0


def test_file_counts(rows):
    distinct = [f"question {i}" for i in range(40)]
    again = ["question 7", "question 8", "x" * 300]
    path = rows([*distinct, *again, "question 7", "x" * 300])
    problems = load(FileTask(path=path), held_out=10)
    check(problems, 10)
    report = problems.report["rows"]
    assert (report.read, report.duplicates, report.over_long, report.held_out, report.train) == (
        45,
        4,
        1,
        10,
        30,
    )
    assert questions(everything(problems)) == set(distinct)
    answers = {p.question: p.answer for p in everything(problems)}
    assert answers["question 7"] == "7"
    assert [int(p.answer) for p in problems.held_out] == sorted(
        int(p.answer) for p in problems.held_out
    )


def test_file_split_is_stable(rows):
    """More rows, another order: rows change sides only where a new row has a lower place."""
    prompts = [f"question {i}" for i in range(40)]
    before = load(FileTask(path=rows(prompts)), held_out=10)
    after = load(FileTask(path=rows([*reversed(prompts), "new"])), held_out=10)
    assert len(questions(before.held_out) & questions(after.held_out)) >= 9
    index = {p.question: p.index for p in everything(before)}
    assert {p.question: p.index for p in everything(after) if p.question != "new"} == index


def test_over_long_is_counted_in_tokens_of_the_whole_prompt(rows):
    path = rows([f"{i:03}" for i in range(20)] + [f"{i:04}" for i in range(5)])
    length = len("\x01user\n\x02\n\x01assistant\n") + 3  # chatml with each special token as one
    problems = load(FileTask(path=path), held_out=4, max_prompt_tokens=length)
    check(problems, 4)
    assert problems.report["rows"].over_long == 5
    assert {len(p.ids) for p in everything(problems)} == {length}
    with pytest.raises(
        DataError,
        match=r"0 distinct problems and 25 longer than data.max_prompt_tokens = 5; 4 must",
    ):
        load(FileTask(path=path), held_out=4, max_prompt_tokens=5)


def test_held_out_path(rows):
    train = rows([f"question {i}" for i in range(40)])
    test = rows([f"question  {i}" for i in range(30, 60)], "test.jsonl")
    problems = load(FileTask(path=train, held_out_path=test), held_out=12)
    check(problems, 12)
    assert all(30 <= int(p.question.split()[1]) < 60 for p in problems.held_out)
    assert questions(problems.train["rows"]) == {
        f"question {i}" for i in range(30)
    }  # nothing of the test file
    with pytest.raises(
        DataError, match="held_out_path has 30 distinct problems; 31 must be held out"
    ):
        load(FileTask(path=train, held_out_path=test), held_out=31)
    with pytest.raises(DataError, match="path has no problem that is not in held_out_path"):
        load(FileTask(path=test, held_out_path=test), held_out=2)


def test_too_few_rows(rows):
    with pytest.raises(
        DataError, match="the file has 10 distinct problems; 10 must be held out and some left"
    ):
        load(FileTask(path=rows([f"question {i}" for i in range(10)] * 2)), held_out=10)


def test_the_mistakes_of_all_tasks_at_once(rows, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": "a", "answer": "b", "verifier": "mth"}\n')
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError) as caught:
        load(
            gym(name="countdown"),
            FileTask(path=str(bad), held_out_path=missing),
            gym(max_term=2),
            FileTask(path=rows(["a"]), verifier="nope"),
        )
    assert len(caught.value.mistakes) == 6
    for part in ("data.tasks[0] (countdown): ", "bad.jsonl:1: `answer` is missing", "bad.jsonl:2: `verifier` 'mth'",
                 "missing.jsonl: there is no such file", "data.tasks[2] (chain_sum): ", "`verifier` 'nope'"):  # fmt: skip
        assert part in str(caught.value)


def test_no_tasks():
    with pytest.raises(DataError, match="data.tasks is empty"):
        load()


def test_registered_verifiers_are_the_default(rows):
    path = rows([f"question {i}" for i in range(10)])
    data = Data(tasks=(FileTask(path=path, verifier="numeric"),), held_out=2)
    assert load_problems(data, BYTE).held_out[0].verifier == "numeric"


def conversation(*contents, question="and now?"):
    """The first content is the user's, then they take turns; `question` comes last."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [*turns, {"role": "user", "content": question}]


def test_conversations_end_to_end(rows):
    prompts = [conversation(f"first {i}", "<think>x</think><|im_end|>") for i in range(30)]
    prompts += [
        conversation("first 3", "<think>x</think><|im_end|>"),
        conversation(),
        "and now?",
    ]
    own = [{"role": "system", "content": "Be kind."}, *conversation("x", "y")]
    path = Path(rows([*prompts, own]))
    # The question as one message and as text is one problem, so it has one answer.
    path.write_text(path.read_text().replace('"answer": "32"', '"answer": "31"'))
    problems = load(FileTask(path=str(path)), held_out=8, system_prompt="Be brief.")
    assert len(problems.held_out) == 8
    report = problems.report["rows"]
    assert (report.read, report.duplicates, report.held_out + report.train) == (34, 2, 32)
    everyone = everything(problems)
    assert {p.question for p in everyone} == {"and now?"}
    assert len({p.index for p in everyone}) == len({p.text for p in everyone}) == 32
    by_answer = {p.answer: p for p in everyone}
    assert by_answer["3"].text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nfirst 3<|im_end|>\n<|im_start|>assistant\n"
        "<think>x</think><|im_end|><|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [i for i in by_answer["3"].ids if i > 255] == [257, 258] * 4 + [257]
    assert by_answer["33"].text.startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nx"
    )
    assert "Be brief" not in by_answer["33"].text


def test_conversations_are_split_as_a_whole(rows):
    """The last message is the same in all of them. What is held out is a whole conversation, whatever
    the task is called."""
    prompts = [conversation(f"first {i}", "b") for i in range(30)]
    one, two = FileTask(path=rows(prompts)), FileTask(path=rows(prompts[::-1], "other.jsonl"))
    problems = load(one, two, held_out=12)
    kept_out = {p.conversation for p in problems.held_out}
    assert len(kept_out) > 0 and "" not in kept_out
    assert all(
        p.conversation not in kept_out for prompts in problems.train.values() for p in prompts
    )


def test_template_variables_and_tools_reach_the_template(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ mood }}:{{ tools | tojson if tools else '' }}{{ messages[-1].content }}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"q {i}", "answer": "a", "tools": [{"n": i}]}) + "\n"
            for i in range(5)
        )
    )
    task, template = FileTask(path=str(path)), str(template)
    problems = load(
        task, held_out=2, chat_template=template, chat_template_kwargs={"mood": "<|im_end|>"}
    )
    for prompt in everything(problems):
        i = prompt.question[-1]
        assert prompt.text == f'<|im_end|>:[{{"n": {i}}}]q {i}'
        assert prompt.ids[0] == BYTE.end_id  # the config is trusted
    with pytest.raises(ValueError, match=r"chat\.jinja has no variable moood; did you mean 'mood'"):
        load(task, held_out=2, chat_template=template, chat_template_kwargs={"moood": "x"})
    with pytest.raises(
        DataError,
        match=r"data\.tasks\[0\] \(rows\): .*rows\.jsonl:1: chat template chatml leaves out the tools",
    ):
        load(task, held_out=2)


def test_templates(rows, bpe, save):
    path = rows([f"question {i}" for i in range(10)])
    plain = load(FileTask(path=path), held_out=2, chat_template="plain")
    assert plain.held_out[0].text == plain.held_out[0].question
    with pytest.raises(ValueError, match="plain leaves out the system message"):
        load(FileTask(path=path), held_out=2, chat_template="plain", system_prompt="Be brief.")
    data = Data(tasks=(FileTask(path=path),), held_out=2)
    with_im_end = load_tokenizer(str(save(bpe, {"eos_token": "<|im_end|>"})))
    ids = load_problems(data, with_im_end, KNOWN).held_out[0].ids
    assert [i for i in ids if i < 3] == [1, 2, 1]
    added = [
        token
        for token in json.loads(bpe.to_str())["added_tokens"]
        if token["content"] != "<|im_start|>"
    ]
    without = load_tokenizer(str(save(bpe, {"eos_token": "<|im_end|>"}, added_tokens=added)))
    with pytest.raises(ValueError, match=r"chatml needs <\|im_start\|> as special tokens"):
        load_problems(data, without, KNOWN)
