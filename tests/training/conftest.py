"""A tiny problem file and a tiny configuration: whole runs in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CONFIG = """
name: tiny
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
        intermediate_size: 64, moe_intermediate_size: 32, initializer_range: 0.1}}
data:
  held_out: 8
  max_prompt_tokens: 16
  chat_template: plain
  tasks: [{{kind: file, path: {problems}, verifier: exact}}]
cold_start: {{steps: 20, batch_size: 16, optimizer: {{learning_rate: 1.0e-2}}}}
rollout: {{prompts_per_step: 4, group_size: 4, max_new_tokens: 4}}
train: {{steps: 5, mini_batches: 2, print_samples_every: 2}}
evaluate: {{every: 2, samples: 4, batch_prompts: 4}}  # as many as in a step: one program samples both
checkpoint: {{every: 4}}
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a)} for a in range(8) for b in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(problems=folder / "problems.jsonl"))
    return path
