"""Writes a workload for all peers: the model as a Hugging Face directory, and `workload.json` (see peers/worker.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import workloads

from sapo_jax.batch import Batch
from sapo_jax.config import Config, Data
from sapo_jax.data import ByteTokenizer
from sapo_jax.hub.export import write_model
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.models import make_policy
from sapo_jax.rollout import pad_sequences

sys.path.append(str(Path(__file__).parent / "peers"))
from worker import Requests, Work  # noqa: E402

DRIFT = 0.05  # nats, standard deviation of the log-ratios that an update starts from


def write_work(name: str, folder: Path) -> Path:
    """The path of its workload.json. What is there already stays: the weights are random, but always the same."""
    path = folder / name / "workload.json"
    if path.exists():
        return path
    cfg = Config(model=workloads.model(name), data=Data(chat_template="plain"))
    policy = make_policy(cfg.model)
    params = jax.jit(policy.init)(jax.random.key(0))
    if not (folder / name / "model").exists():
        write_model(folder / name / "model", params, cfg, ByteTokenizer(), "float32")
    prompts, completions = workloads.prompt_ids(name), workloads.completion_ids(name)
    B, G = len(completions), workloads.GROUP
    equal = [workloads.NEW_TOKENS] * B
    many = workloads.prompt_ids(name, workloads.REQUESTS // G)
    rng = np.random.default_rng(2)
    advantages = rng.normal(size=(B // G, G))
    advantages -= advantages.mean(axis=1, keepdims=True)
    work = Work(
        name=name,
        model=str((folder / name / "model").resolve()),
        prompts=prompts,
        group=G,
        completions=completions,
        old_logp=[],
        advantages=advantages.reshape(-1).tolist(),
        slots=workloads.SLOTS,
        **workloads.TRAINING,
        requests={
            "rollout": Requests(prompts, equal),
            "tail16": Requests(prompts, workloads.lengths(B)),
            "tail64": Requests(many, workloads.lengths(workloads.REQUESTS)),
            "iteration": Requests(prompts, equal),
        },
    )
    old_logp = completion_logps(work, policy, params)
    old_logp = old_logp + rng.normal(0, DRIFT, old_logp.shape).astype(np.float32)
    work.old_logp.extend(old_logp.tolist())
    work.write(path)
    return path


def completion_logps(work: Work, policy, params) -> np.ndarray:
    """BC, from plain rows, one sequence each."""
    S = len(work.prompts[0])
    arrays = pad_sequences([(ids, S) for ids in work.sequences], 0)
    unused = np.zeros(arrays["tokens_BT"].shape, np.float32)
    logp_BT, _ = make_scorer(policy, 1.0, 1)(
        params, Batch(**arrays, adv_BT=unused, weight_BT=unused)
    )
    return np.asarray(logp_BT)[:, S : S + len(work.completions[0])]


if __name__ == "__main__":  # in a process of its own: the driver stays small
    write_work(sys.argv[1], Path(sys.argv[2]))
