"""A small byte-level BPE tokenizer, as Hugging Face lays it out on disk."""

import json

import hypothesis
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sapo_jax.types import Prompt

# Property-based tests: the same examples in every run, and no deadline on a busy machine.
hypothesis.settings.register_profile("data", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("data")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "user\nWhat is 12 plus 7?",
    "assistant\nThe answer is 19.",
    "system\nBe brief.",
    "ünïcödé ✓",
]


@pytest.fixture(scope="session")
def bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    return tokenizer


@pytest.fixture
def save(tmp_path):
    """save(tokenizer, config, generation) writes the files of a model directory and returns it."""

    def write(tokenizer, config=None, generation=None, **edit):
        spec = {**json.loads(tokenizer.to_str()), **edit}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


@pytest.fixture
def make_prompts():
    def make(task: str, count: int, first: int = 0) -> list[Prompt]:
        return [
            Prompt(i, f"{task} {i}", (1, 2), f"{task} {i}", str(i), "math", task)
            for i in range(first, first + count)
        ]

    return make
