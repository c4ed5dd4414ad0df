"""For all tests: compiled programs are let go of; a tiny pretrained model, for configurations that start from one."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from sapo_jax.config import Config, Data, Model
from sapo_jax.data import load_tokenizer
from sapo_jax.hub.export import write_model
from sapo_jax.models import make_policy

# The files that take longest in `make test`, longest first.
LONGEST_FILES = (
    "training/test_resume.py",
    "training/test_end_to_end.py",
    "training/test_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that two workers, which take a file at a time, end together."""
    tests = Path(__file__).parent
    missing = [name for name in LONGEST_FILES if not (tests / name).exists()]
    if missing:
        raise pytest.UsageError(f"LONGEST_FILES names files that are gone: {missing}")

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(tests).as_posix()
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory, request):
    """What one test compiled, the others and the processes that they start read.

    With JAX_COMPILATION_CACHE_DIR set, the programs stay in that folder for later sessions.
    """
    base = tmp_path_factory.getbasetemp()
    session_folder = base.parent if hasattr(request.config, "workerinput") else base
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(session_folder / "programs"))
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def no_heap_of_programs():
    """Each compiled program keeps its memory maps; past vm.max_map_count (65530) of them the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama-shaped model of the byte tokenizer, as a Hugging Face directory."""
    cfg = Model(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, qk_norm=False,
    )  # fmt: skip
    folder, whole = (
        tmp_path_factory.mktemp("model") / "model",
        Config(model=cfg, data=Data(chat_template="chatml")),
    )
    write_model(
        folder, make_policy(cfg).init(jax.random.key(0)), whole, load_tokenizer("byte"), "float32"
    )
    return folder
