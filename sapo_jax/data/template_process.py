"""Chat templates of files, rendered in a process that can be ended.

A template comes with a model that somebody else has made. Jinja's sandbox keeps it away from the
program, but not from the processor: a loop within a loop, `range(10 ** 5)` each, takes hours, and
`'x' * 10 ** 10` takes all memory. So it is compiled and rendered in a process of its own
(`template_worker.py`), with limits on time, memory and the length of the prompt. Built-in templates
are rendered in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from sapo_jax.data.messages import Message, Tool
from sapo_jax.data.stand_ins import Piece
from sapo_jax.data.template import BUILT_IN, ChatTemplate, template_source
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.rewards.pipes import Died, Garbled, Pipes

START_SECONDS = 120.0  # for the process to start; on a busy machine that takes a while
SECONDS = 10.0  # for the template to be compiled, and for each prompt
MEMORY_MB = 1024  # MiB of address space
_MAX_REPLY = 2**28  # bytes


class Renderer(Protocol):
    """What renders prompts."""

    def check_variables(self, names: Collection[str]) -> None: ...

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[Piece]: ...

    def close(self) -> None: ...


class InProcess(ChatTemplate):
    """A built-in template."""

    def close(self) -> None:
        """There is nothing to close."""


class TemplateProcess:
    """A chat template in a process of its own; the arguments are those of `ChatTemplate`.

    `check_variables` and `pieces` are those of `ChatTemplate` too. Where the process does not
    answer in time or takes too much memory it is ended, and they raise ValueError.
    """

    def __init__(
        self,
        source: str,
        name: str,
        special_tokens: Collection[str],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._template = {
            "source": source,
            "name": name,
            "special_tokens": list(special_tokens),
            "variables": dict(variables or {}),
            "memory_mb": MEMORY_MB,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: Pipes | None = None

    def check_variables(self, names: Collection[str]) -> None:
        self._ask({"check": list(names)})

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[Piece]:
        request = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
        }
        reply = self._ask({"render": request})
        return [(text, trusted) for text, trusted in reply["pieces"]]

    def close(self) -> None:
        """End the process. The next request starts another one."""
        process = self._process
        pipes = self._pipes
        self._process = None
        self._pipes = None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it is gone
        process.wait()
        if pipes is not None:
            pipes.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises ValueError for a mistake that it names."""
        try:
            line = json.dumps(request).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a message is not made of JSON values: {error}") from error
        if self._pipes is None:
            self._start()
        return self._answer(line, SECONDS)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sapo_jax.data.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=_environment(),
        )
        self._pipes = Pipes(self._process, _MAX_REPLY)
        self._answer(b"{}", START_SECONDS)  # it has started
        try:
            self._answer(json.dumps({"template": self._template}).encode("ascii"), SECONDS)
        except ValueError:  # it cannot be compiled
            self.close()
            raise

    def _answer(self, line: bytes, seconds: float) -> dict[str, Any]:
        pipes = self._pipes
        assert pipes is not None
        try:
            pipes.send(line)
            reply = json.loads(pipes.receive(seconds))
        except TimeoutError:
            self.close()
            raise ValueError(
                f"chat template {self.name}: no prompt within {seconds:g} s; does it loop?"
            ) from None
        except (Died, Garbled):
            self.close()
            raise ValueError(
                f"chat template {self.name}: the process that renders it has ended; it may use"
                f" {MEMORY_MB} MiB of memory. {pipes.last_words()[-300:]}"
            ) from None
        except BaseException:
            self.close()
            raise
        if "mistake" in reply:
            raise ValueError(reply["mistake"])
        return reply


def _environment() -> dict[str, str]:
    """What the trainer can import, the process can import."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def open_template(name_or_path: str, tokenizer: Tokenizer) -> Renderer:
    """A template for prompts of this tokenizer, to be closed; the arguments and errors are those of
    `template_source`."""
    name, source = template_source(name_or_path, tokenizer)
    if name in BUILT_IN:
        return InProcess(source, name, tokenizer.special_tokens, tokenizer.template_variables)
    return TemplateProcess(source, name, tokenizer.special_tokens, tokenizer.template_variables)
