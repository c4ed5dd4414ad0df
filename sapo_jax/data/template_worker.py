"""The process that renders a chat template: `python -m sapo_jax.data.template_worker`.

`template_process.py` starts it. They exchange lines of JSON:

    request                                                           reply
    {}                                                                {}
    {"template": {"source": .., "name": .., "special_tokens": [..],
                  "variables": {..}, "memory_mb": n}}                 {}
    {"check": [names of variables]}                                   {}
    {"render": {"messages": [..], "tools": .., "variables": {..},
                "add_generation_prompt": bool}}                       {"pieces": [[text, bool], ..]}

The reply is {"mistake": text} where the template refuses.
"""

from __future__ import annotations

import json
import os
from typing import Any

from sapo_jax.data.template import ChatTemplate
from sapo_jax.rewards import child


def main() -> None:
    """Answer requests until the pipe is closed."""
    requests, replies = child.take_pipes()
    templates: list[ChatTemplate] = []
    try:
        for line in requests:
            reply = _reply(json.loads(line), templates)
            replies.write(json.dumps(reply).encode("ascii") + b"\n")
            replies.flush()
    except MemoryError:
        os._exit(1)
    child.kill_own_group()


def _reply(request: dict[str, Any], templates: list[ChatTemplate]) -> dict[str, Any]:
    try:
        if "template" in request:
            template = request["template"]
            child.limit_memory(template.pop("memory_mb") * 2**20)
            templates.append(ChatTemplate(**template))
        if "check" in request:
            templates[0].check_variables(request["check"])
        if "render" in request:
            asked = request["render"]
            pieces = templates[0].pieces(
                asked["messages"],
                asked["tools"],
                asked["add_generation_prompt"],
                **asked["variables"],
            )
            return {"pieces": pieces}
    except ValueError as mistake:
        return {"mistake": str(mistake)[:2000]}
    return {}


if __name__ == "__main__":
    main()
