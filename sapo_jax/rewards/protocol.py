"""What the trainer (`process.py`) and a verifier worker (`worker.py`) say to each other.

They exchange lines of JSON. The worker answers a request before the next one is sent.

    request                                                          reply
    {"setup": {"plugins": [..], "memory_mb": n, "deadline": s}}      {"ready": true}  (always first)
    {"prepare": name}                                                {"ready": true}
    {"items": [{"verifier": name, "response": ..,                    a line for each of them, in
               "answer": .., "metadata": ..}, ..]}                   their order, once it is graded:
                                                 {"number": n, "verdict": {"status": ..,
                                                  "reward": .., "detail": ..}, "retire": bool}

An item without a response asks whether the verifier can use the gold answer; the verdict is "wrong"
where it cannot, and the detail says why.

The first two are answered by {"failed": traceback} where they fail. `number` counts the items since
the worker started, from 1. A worker begins an item when it has written the verdict on the one
before; so whoever has read n verdicts knows which item is in progress, and whose fault the worker's
death is. "retire" asks the trainer to kill the worker, which grades no other item, because this one
left too much memory occupied.
"""

from __future__ import annotations

import dataclasses

OUT_OF_MEMORY = 77  # exit code of a worker whose verifier ran into the limit on memory


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told when it starts; the config keys `rewards.*` of the same names."""

    plugins: tuple[str, ...]  # modules to import that register verifiers
    memory_mb: int  # MiB of address space that the worker may take
    deadline: float  # seconds that one item may take


@dataclasses.dataclass(frozen=True)
class Item:
    """One completion to grade."""

    verifier: str  # the name of the verifier
    request: bytes  # the JSON object above, in ASCII
