"""Tokenizers that mark <think> or <answer> as special tokens: answers are found all the same."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sapo_jax.batch import Rollout
from sapo_jax.data import FileTokenizer
from sapo_jax.rewards import VerifierPool
from sapo_jax.rewards.extract import ANSWER_MARKS, FORMS, extract_answer
from sapo_jax.training.experience import grade
from sapo_jax.types import Prompt

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def tokenizer_with(folder, special, ordinary=()):
    """A byte-level tokenizer whose special tokens are these and an end token."""
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", *special])
    backend.add_tokens([tokenizers.AddedToken(mark, special=False) for mark in ordinary])
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return FileTokenizer(folder / "tokenizer.json")


KINDS = {
    "all special": ANSWER_MARKS,
    "thoughts special": ANSWER_MARKS[:2],
    "answers special": ANSWER_MARKS[2:],
    "closing tags special": ANSWER_MARKS[1::2],
    "none special": (),
}
# A completion, and the answer that each form takes from it (None: there is none).
COMPLETIONS = {
    r"<think>it is \boxed{1}</think><answer>2</answer><|im_end|>": {
        "auto": "<answer>2</answer>",
        "final": "<answer>2</answer>",
        "answer_tag": "2",
        "boxed": "1",
        "last_number": "2",
        "all": r"<think>it is \boxed{1}</think><answer>2</answer>",
    },
    r"<think>1, no 3</think>\boxed{4}<|im_end|>": {
        "auto": "4",
        "final": r"\boxed{4}",
        "answer_tag": None,
        "boxed": "4",
    },
    r"<think>\boxed{5}<|im_end|>": {"auto": None, "final": None, "boxed": "5"},
    "<answer>6</answer> or <answer>7</answer><|im_end|>": {"answer_tag": "7"},
    "<|im_start|><answer>8<|im_end|>": {"answer_tag": None, "last_number": "8"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_finds_its_answer(tmp_path, kind):
    special = KINDS[kind]
    ordinary = [mark for mark in ANSWER_MARKS if mark not in special]
    tokenizer = tokenizer_with(tmp_path, special, ordinary)
    for completion, answers in COMPLETIONS.items():
        ids = tokenizer.encode(completion, allow_special=True)
        assert len(ids) < len(completion)  # the marks are tokens
        text = tokenizer.decode(ids)
        assert "<|im_end|>" not in text and "<|im_start|>" not in text
        for form, answer in answers.items():
            assert form in FORMS
            assert extract_answer(text, form) == answer


def test_a_rollout_is_graded_by_its_marks(tmp_path):
    """Of two completions of one prompt only the one whose final answer is right is right."""
    tokenizer = tokenizer_with(tmp_path, ANSWER_MARKS)
    texts = ["<think>42</think>41<|im_end|>", "<think>41</think>42<|im_end|>"]
    ids = [tokenizer.encode(text, allow_special=True) for text in texts]
    rollout = Rollout(
        tokens_BC=np.array(ids),
        logp_BC=np.zeros((2, len(ids[0])), np.float32),
        length_B=np.array([len(row) for row in ids]),
        finish_B=np.zeros(2, np.int32),
    )
    prompt = Prompt(0, "text", (1,), "question", "42", "exact", "task")
    with VerifierPool(extract="final") as pool:
        graded = grade(pool, tokenizer, [prompt], rollout)
    assert [verdict.status for verdict in graded.verdicts] == ["wrong", "ok"]
    assert graded.texts == ["<think>42</think>41", "<think>41</think>42"]


def test_the_published_qwen3_tokenizer_keeps_its_thoughts():
    from tests import fetch_tokenizers

    if fetch_tokenizers.missing():
        pytest.skip("run `python tests/fetch_tokenizers.py` first")
    tokenizer = FileTokenizer(fetch_tokenizers.FOLDER / "tokenizer.json")
    ids = tokenizer.encode("<think>\n1\n</think>\n\n2<|im_end|>", allow_special=True)
    assert extract_answer(tokenizer.decode(ids), "final") == "2"
