"""For all tests: compiled programs are let go of; a tiny pretrained model, for configurations that start from one."""

from __future__ import annotations

import collections
import functools
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from sapo_jax.config import Config, Data, Model
from sapo_jax.data import load_tokenizer
from sapo_jax.hub.export import write_model
from sapo_jax.models import make_policy

# The seconds that each file took, by which the files are ordered; made by --store-seconds.
SECONDS = Path(__file__).with_name("file_seconds.json")
seconds_of_file: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-seconds",
        action="store_true",
        help=f"write the seconds that each file takes to {SECONDS.name}, which orders the files",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that two workers, which take a file at a time, end together."""
    tests = SECONDS.parent
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(item.path.relative_to(tests).as_posix(), 0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    seconds_of_file[file.removeprefix("tests/")] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if not session.config.getoption("--store-seconds") or is_worker:
        return
    took = {file: round(seconds) for file, seconds in seconds_of_file.most_common()}
    noticed = {file: seconds for file, seconds in took.items() if seconds > 0}
    SECONDS.write_text(json.dumps(noticed, indent=1) + "\n", encoding="utf-8")


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


@pytest.fixture(scope="session")
def stand_ins(tiny_model, tmp_path_factory) -> Callable[[Path], list[str]]:
    """Overrides for a config file that asks for what a fresh clone lacks.

    A pretrained model becomes the tiny one; the files of the graded tasks are made.
    """
    scripts = Path(__file__).parents[1] / "experiments"

    @functools.cache
    def graded() -> Path:
        folder = tmp_path_factory.mktemp("graded")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(scripts)
            importlib.import_module("graded_tasks").main([str(folder)])
        return folder

    def overrides(path: Path) -> list[str]:
        text = path.read_text()
        found = []
        if "model: {path:" in text:
            found.append(f"model.path={tiny_model}")
        if "runs/graded/" in text:
            tasks = re.findall(r"path: runs/graded/(\w+).jsonl", text)
            found += [
                f"data.tasks.{i}.path={graded()}/{task}.jsonl" for i, task in enumerate(tasks)
            ]
            found.append(f"cold_start.demonstrations={graded()}/demonstrations.jsonl")
        return found

    return overrides
