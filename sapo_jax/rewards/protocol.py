"""What the trainer (`process.py`) and a verifier worker (`worker.py`) say to each other.

They exchange lines of JSON. The trainer sends one request, the worker answers it before the next
one is sent; so whoever sent the last request knows whose fault the worker's death is.

    request                                                          reply
    {"setup": {"plugins": [..], "memory_mb": n, "deadline": s}}      {"ready": true}  (always first)
    {"prepare": name}                                                {"ready": true}
    {"verifier": name, "response": .., "answer": .., "metadata": ..} {"verdict": {"status": ..,
                                                                      "reward": .., "detail": ..},
                                                                      "retire": true or false}

The first two are answered by {"failed": traceback} where they fail. "retire" asks the trainer to
kill the worker before it sends another item, because this one left too much memory occupied.
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
