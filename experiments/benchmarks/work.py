"""Writes a workload for all sides: the model as a Hugging Face directory, and `workload.json`.

    python experiments/benchmarks/work.py WORKLOAD FOLDER     compare.py runs this when needed

What is in the JSON file: peers/worker.py, `Work`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import workloads

from sapo_jax.batch import Batch, Params
from sapo_jax.config import Config, Data
from sapo_jax.data import ByteTokenizer
from sapo_jax.hub.export import write_model
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.models import Policy, make_policy
from sapo_jax.rollout import pad_sequences

sys.path.append(str(Path(__file__).parent / "peers"))
from worker import Requests, Work  # noqa: E402

DRIFT = 0.05  # nats, standard deviation of the log-ratios that an update starts from


def write_work(name: str, folder: Path) -> Path:
    """The path of the workload's workload.json.

    What is there already stays: the weights are random, but always the same.
    """
    path = folder / name / "workload.json"
    if path.exists():
        return path
    cfg = Config(model=workloads.model(name), data=Data(chat_template="plain"))
    policy = make_policy(cfg.model)
    params = jax.jit(policy.init)(jax.random.key(0))
    model_folder = folder / name / "model"
    if not model_folder.exists():
        write_model(model_folder, params, cfg, ByteTokenizer(), "float32")

    group = workloads.GROUP
    prompts = workloads.prompt_ids(name)
    completions = workloads.completion_ids(name)
    rng = np.random.default_rng(2)
    advantages_PG = rng.normal(size=(len(prompts), group))
    advantages_PG -= advantages_PG.mean(axis=1, keepdims=True)
    work = Work(
        name=name,
        model=str(model_folder.resolve()),
        prompts=prompts,
        group=group,
        completions=completions,
        old_logp=[],
        advantages=advantages_PG.reshape(-1).tolist(),
        slots=workloads.SLOTS,
        **workloads.TRAINING,
        requests=all_requests(name),
    )
    logp_BC = completion_logps(work, policy, params)
    old_logp_BC = logp_BC + rng.normal(0, DRIFT, logp_BC.shape).astype(np.float32)
    work.old_logp.extend(old_logp_BC.tolist())
    work.write(path)
    return path


def all_requests(name: str) -> dict[str, Requests]:
    """What is sampled in each of the jobs that sample."""
    prompts = workloads.prompt_ids(name)
    many_prompts = workloads.prompt_ids(name, workloads.REQUESTS // workloads.GROUP)
    sequences = len(prompts) * workloads.GROUP
    equal = Requests(prompts, [workloads.NEW_TOKENS] * sequences)
    return {
        "rollout": equal,
        "tail16": Requests(prompts, workloads.lengths(sequences)),
        "tail64": Requests(many_prompts, workloads.lengths(workloads.REQUESTS)),
        "iteration": equal,
    }


def completion_logps(work: Work, policy: Policy, params: Params) -> np.ndarray:
    """Log-probs of the completions, BC, scored in plain rows with one sequence each."""
    prompt_tokens = len(work.prompts[0])
    new_tokens = len(work.completions[0])
    arrays = pad_sequences([(ids, prompt_tokens) for ids in work.sequences], 0)
    unused_BT = np.zeros(arrays["tokens_BT"].shape, np.float32)
    batch = Batch(**arrays, adv_BT=unused_BT, weight_BT=unused_BT)
    logp_BT = make_scorer(policy, 1.0, 1)(params, batch).logp_BT
    return np.asarray(logp_BT)[:, prompt_tokens : prompt_tokens + new_tokens]


if __name__ == "__main__":  # in a process of its own, so that the driver stays small
    write_work(sys.argv[1], Path(sys.argv[2]))
