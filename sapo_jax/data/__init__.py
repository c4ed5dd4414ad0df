"""Data: sources -> problems -> prompts, split into training and held-out -> resumable batches.

In the order of the flow: `sources.py` reads problems from generators and files, whose columns
`layouts.py` finds; `messages.py` checks and prepares conversations; `template.py` (with
`chat_jinja.py`) renders them as prompts, for templates of files in a process that can be ended
(`template_process.py`); `tokenizer.py` encodes these; `stand_ins.py` keeps special
tokens that data only spells apart from those that are meant; `problems.py` joins all that and
splits the prompts; `batches.py` draws batches, and `identity.py` tells whether their data is still
the same; `sft.py` makes supervised examples.

Importing this package imports no JAX.
"""

from sapo_jax.data.batches import PromptBatches
from sapo_jax.data.identity import trained_on
from sapo_jax.data.problems import (
    Problems,
    PromptMaker,
    TaskReport,
    load_demonstrations,
    load_problems,
)
from sapo_jax.data.sft import check_response_template, sft_example
from sapo_jax.data.sources import GoldCheck, Problem, generate_reasoning_gym, read_problems
from sapo_jax.data.template import ChatTemplate, load_template, template_source
from sapo_jax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer
from sapo_jax.errors import DataError

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "DataError",
    "FileTokenizer",
    "GoldCheck",
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
    "template_source",
    "trained_on",
]
