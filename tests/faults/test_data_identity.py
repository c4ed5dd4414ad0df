"""What enters a run's numbers is in a digest: a resume after a change names the rows.

Commands that read a run do not score what it was trained on as held out.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from sapo_jax.config import Config, Data, FileTask, dump
from sapo_jax.data import PromptBatches, load_problems, load_tokenizer
from sapo_jax.data import identity as identity_module
from sapo_jax.errors import DataError, RunError
from sapo_jax.training.held_out import check_held_out
from sapo_jax.training.run import TrainedParams

BYTE = load_tokenizer("byte")
ROWS = [{"prompt": f"question {i}", "answer": str(i), "metadata": {"n": i}} for i in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(rows, name="rows.jsonl"):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def open_batches(rows=ROWS, test_rows=None, **data):
    """Batches of a task whose first rows are trained on, the rows of another file held out."""
    write(rows)
    write(test_rows or [{"prompt": f"test {i}", "answer": "1"} for i in range(3)], "test.jsonl")
    task = FileTask(path="rows.jsonl", held_out_path="test.jsonl")
    problems = load_problems(Data(tasks=(task,), held_out=3, **data), BYTE, ("math", "exact"))
    batches = PromptBatches(problems.train, {"rows": 1.0}, 4, seed=0, held_out=problems.held_out)
    return batches


def saved_state():
    """The state as it comes back from a checkpoint, after three batches."""
    batches = open_batches()
    for _ in range(3):
        next(batches)
    return json.loads(json.dumps(batches.get_state()))


def edited(position, **fields):
    """The rows with one of them changed."""
    return [{**row, **fields} if i == position else row for i, row in enumerate(ROWS)]


ANSWER = "1 changed: line 6 ('question 5'): its answer"
PROMPT = "its rendered prompt (its text, the system prompt, the chat template or the tokenizer)"


@pytest.mark.parametrize(
    "rows, told",
    [
        (edited(5, answer="55"), f"12 problems then, 12 now; {ANSWER}"),
        (edited(5, metadata={"n": 6}), "line 6 ('question 5'): its verifier or metadata"),
        (edited(5, verifier="exact"), "line 6 ('question 5'): its verifier or metadata"),
        (edited(5, prompt="question  5"), f"line 6 ('question 5'): {PROMPT}"),
        (
            edited(5, prompt="another"),
            "1 added: line 6 ('another'); 1 removed: what was line 6",
        ),
        (ROWS[:9], "12 problems then, 9 now; 3 removed: what was line 10, what was line 11, what"),
        (ROWS[:7], "5 removed: what was line 8, what was line 9, what was line 10, ..."),
        (
            [*ROWS, {"prompt": "new", "answer": "0"}],
            "12 problems then, 13 now; 1 added: line 13 ('new')",
        ),
        (ROWS[::-1], "12 problems then, 12 now; the same problems in another order"),
    ],
    ids=["answer", "metadata", "verifier", "white space", "question", "cut", "cut more", "added",
         "order"],
)  # fmt: skip
def test_a_resume_after_a_change_names_file_and_rows(folder, rows, told):
    state = saved_state()
    with pytest.raises(DataError) as caught:
        open_batches(rows).set_state(state)
    message = str(caught.value)
    assert told in message
    assert message.startswith(
        "the saved position is of other data, it cannot be resumed: task rows, ro"
    )
    assert "digest" not in message
    assert message.endswith("or begin another run: another name or run_dir")


def test_the_held_out_problems_count(folder):
    state = saved_state()
    test_rows = [{"prompt": f"test {i}", "answer": str(i)} for i in range(3)]
    with pytest.raises(DataError, match=r"held-out problems, test\.jsonl: 3 problems then, 3 now; "
                       r"2 changed: line 1 \('test 0'\): its answer, line 3"):  # fmt: skip
        open_batches(test_rows=test_rows).set_state(state)


def test_the_content_of_a_template_and_the_system_prompt_count(folder):
    template = folder / "chat.jinja"
    template.write_text("Q: {{ messages[-1].content }}")
    state = open_batches(chat_template=str(template)).get_state()
    assert open_batches(chat_template=str(template)).set_state(state) == []
    template.write_text("q: {{ messages[-1].content }}")
    with pytest.raises(DataError, match="12 changed: line 1 .*: its rendered prompt"):
        open_batches(chat_template=str(template)).set_state(state)
    with pytest.raises(DataError, match="12 changed: line 1 .*: its rendered prompt"):
        open_batches(system_prompt="Be brief.").set_state(saved_state())


def test_unchanged_data_resumes_without_a_word(folder):
    state = saved_state()
    again = open_batches()
    assert again.set_state(state) == []
    assert again.get_state() == state


def test_where_the_file_lies_does_not_count(folder):
    """The same rows further down, and in a file of another folder, are the same data."""
    state = saved_state()
    batches = open_batches()
    prompts = batches._prompts["rows"]
    moved = [dataclasses.replace(prompt, where="elsewhere.jsonl:99") for prompt in prompts]
    other = PromptBatches({"rows": moved}, {"rows": 1.0}, 4, 0, held_out=batches._held_out)
    assert other.set_state(state) == []


def test_a_checkpoint_of_before_resumes_with_a_notice(folder):
    state = saved_state()
    del state["held_out"]
    del state["tasks"]["rows"]["content"]
    notices = open_batches(edited(5, answer="55")).set_state(state)
    assert len(notices) == 1
    assert (
        "before it held a digest of the problems of task rows, the held-out problems" in notices[0]
    )
    with pytest.raises(DataError, match="tasks.rows.prompts was 12, is 11"):
        open_batches(ROWS[:11]).set_state(state)


def test_more_problems_than_are_marked(folder, monkeypatch):
    monkeypatch.setattr(identity_module, "MAX_MARKED", 5)
    state = saved_state()
    assert state["tasks"]["rows"]["content"]["marks"] is None
    assert open_batches().set_state(state) == []
    with pytest.raises(DataError, match="12 problems then, 12 now; more than 5 are not told apart"):
        open_batches(edited(5, answer="55")).set_state(state)


@pytest.mark.parametrize("marks", [7, "!", "AAAA", None])
def test_damaged_marks_still_tell_that_something_changed(folder, marks):
    state = saved_state()
    state["tasks"]["rows"]["content"]["marks"] = marks
    with pytest.raises(DataError, match="rows.jsonl: 12 problems then, 12 now"):
        open_batches(edited(5, answer="55")).set_state(state)


# ---------------------------------------------------------------- reading commands


def config(held_out=4, seed=0):
    task = FileTask(path="rows.jsonl")
    return Config(data=Data(tasks=(task,), held_out=held_out, seed=seed))


def opened(cfg):
    """What `check_held_out` needs of a run."""
    problems = load_problems(cfg.data, BYTE, ("math",))
    folder = SimpleNamespace(logs=None)
    verifiers = SimpleNamespace(check_golds=all_golds_are_good)
    return SimpleNamespace(
        cfg=cfg, problems=problems, tokenizer=BYTE, folder=folder, verifiers=verifiers
    )


def all_golds_are_good(golds, notice):
    return [None] * len(golds)


@pytest.fixture
def trained(folder):
    """The checkpoint of a run that held 4 of 12 problems out and trained on 8."""
    write(ROWS)
    run = opened(config())
    batches = PromptBatches(
        run.problems.train, {"rows": 1.0}, 4, seed=0, held_out=run.problems.held_out
    )
    (folder / "config.yaml").write_text(dump(config()))
    return TrainedParams("rl", 3, {}, json.loads(json.dumps(batches.get_state())))


def test_the_runs_own_split_is_scored(trained):
    check_held_out(opened(config()), trained)
    check_held_out(opened(config(held_out=3)), trained)  # fewer of the same


@pytest.mark.parametrize("change", [{"held_out": 10}, {"seed": 1}])
def test_trained_problems_are_not_scored_as_held_out(trained, change):
    with pytest.raises(RunError, match=r"of the \d+ held-out problems were trained on by this run"):
        check_held_out(opened(config(**change)), trained)


def test_ten_held_out_of_which_six_were_trained_on(trained):
    with pytest.raises(RunError, match="^6 of the 10 held-out problems were trained on"):
        check_held_out(opened(config(held_out=10)), trained)


def test_a_file_that_was_cut_short(trained):
    held_out = {prompt.question for prompt in opened(config()).problems.held_out}
    write([row for row in ROWS if row["prompt"] not in held_out])
    with pytest.raises(RunError, match="^4 of the 4 held-out problems were trained on by this run"):
        check_held_out(opened(config()), trained)


def test_pretrained_weights_have_trained_on_nothing(trained):
    check_held_out(opened(config(held_out=10)), TrainedParams("pretrained", 0, {}))


def test_a_checkpoint_of_before_is_judged_by_its_config(trained, folder, capsys):
    data = json.loads(json.dumps(trained.data))
    del data["held_out"]
    del data["tasks"]["rows"]["content"]
    before = dataclasses.replace(trained, data=data)
    run = opened(config(held_out=10))
    run.folder.logs = folder
    with pytest.raises(RunError, match="^6 of the 10 held-out problems were trained on"):
        check_held_out(run, before)
    assert "notice: the checkpoint does not hold which problems" in capsys.readouterr().err
    run = opened(config())
    run.folder.logs = folder
    check_held_out(run, before)


def test_demonstrations_of_held_out_problems(trained):
    write([{"prompt": "other", "answer": "x"}, ROWS[0]], "shown.jsonl")
    held_out = [{"prompt": f"new {i}", "answer": "1"} for i in range(3)] + [ROWS[0]]
    write(held_out, "test.jsonl")
    cfg = config()
    task = FileTask(path="rows.jsonl", held_out_path="test.jsonl")
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, tasks=(task,)),
        cold_start=dataclasses.replace(cfg.cold_start, steps=1, demonstrations="shown.jsonl"),
    )
    with pytest.raises(RunError, match="^1 of the 4 held-out problems .*'question 0'"):
        check_held_out(opened(cfg), trained)
