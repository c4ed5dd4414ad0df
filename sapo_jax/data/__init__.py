"""Data: sources -> prompts, split into training and held-out -> resumable batches; tokenizers, chat templates."""

from sapo_jax.data.batches import PromptBatches
from sapo_jax.data.problems import (
    Problems,
    PromptMaker,
    TaskReport,
    load_demonstrations,
    load_problems,
)
from sapo_jax.data.sft import check_response_template, sft_example
from sapo_jax.data.sources import Problem, generate_reasoning_gym, read_problems
from sapo_jax.data.template import ChatTemplate, load_template
from sapo_jax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from sapo_jax.errors import DataError

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "DataError",
    "FileTokenizer",
    "Problem",
    "Problems",
    "PromptBatches",
    "PromptMaker",
    "TaskReport",
    "Tokenizer",
    "check_response_template",
    "generate_reasoning_gym",
    "load_demonstrations",
    "load_problems",
    "load_template",
    "load_tokenizer",
    "read_problems",
    "sft_example",
]
