"""TRL's GRPOTrainer on a CPU, with its defaults: fused and chunked LM head, AdamW, `generate`.

`iteration` and `update` are steps of `trainer.train()`, from on_step_begin to on_log; in `update`
the trainer finds its completions ready. `score` and `rollout` are the methods that the trainer
calls for them.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from worker import Job, Work, reward, serve

FOREVER = 10**6  # steps; the driver says when to stop


class Trainer(GRPOTrainer):
    """Takes prompts that are ids already, as JSON texts of the data set.

    `prepared` is a batch that takes the place of generated completions.
    """

    prepared: dict | None = None

    def _tokenize_prompts(self, prompts):
        return [json.loads(prompt) for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs):
        if self.prepared:
            return dict(self.prepared)
        return super()._generate_and_score_completions(inputs)


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward(ids) for ids in completion_ids]


def make_trainer(work: Work) -> Trainer:
    torch.set_num_threads(os.cpu_count())
    new_tokens = len(work.completions[0])
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        seed=0,
        max_steps=FOREVER,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=len(work.completions),
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=work.group,
        max_completion_length=new_tokens,
        generation_kwargs={"min_new_tokens": new_tokens},
        loss_type="grpo",
        beta=0.0,
        epsilon=work.clip,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=work.max_grad_norm,
        adam_beta2=0.95,
        weight_decay=0.0,
        router_aux_loss_coef=0.0,
    )
    return Trainer(
        AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        rewards,
        args,
        Dataset.from_dict({"prompt": [json.dumps(ids) for ids in work.prompts]}),
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )


class Steps(TrainerCallback):
    """Lets `trainer.train()`, in a thread of its own, take one step for each call of `run`."""

    def __init__(self, trainer: Trainer):
        self._go: queue.Queue = queue.Queue()
        self._done: queue.Queue = queue.Queue()
        self._trainer = trainer
        trainer.add_callback(self)
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:
            self._done.put(error)
            raise

    def on_step_begin(self, *_args, **_kwargs):
        self._go.get()

    def on_log(self, _args, _state, _control, logs, **_kwargs):
        self._done.put(logs)

    def run(self) -> dict[str, Any]:
        """Lets one step happen; returns its log."""
        self._go.put(None)
        log_or_error = self._done.get()
        if isinstance(log_or_error, BaseException):
            raise log_or_error
        return log_or_error


def prepared_batch(work: Work) -> dict[str, torch.Tensor]:
    """The completions to train on, in the form in which the trainer makes them."""
    prompt_tokens = len(work.prompts[0])
    ids = torch.tensor(work.sequences)
    prompt_ids = ids[:, :prompt_tokens]
    completion_ids = ids[:, prompt_tokens:]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "old_per_token_logps": torch.tensor(work.old_logp),
        "advantages": torch.tensor(work.advantages),
        "num_items_in_batch": torch.tensor(completion_ids.numel()),
    }


def score_job(work: Work) -> Job:
    trainer = make_trainer(work)
    ids_BT = torch.tensor(work.sequences)
    new_tokens = len(work.completions[0])

    @torch.no_grad()
    def run() -> torch.Tensor:
        mask_BT = torch.ones_like(ids_BT)
        logp_BC, _entropies = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids_BT, mask_BT, new_tokens, len(ids_BT)
        )[:2]
        return logp_BC

    return Job(run, lambda logp_BC: {"logp": logp_BC.tolist()})


def update_job(work: Work) -> Job:
    trainer = make_trainer(work)
    trainer.prepared = prepared_batch(work)

    def evidence(log: dict[str, Any]) -> dict[str, float]:
        return {name: float(log[name]) for name in ("loss", "grad_norm")}

    return Job(Steps(trainer).run, evidence)


def rollout_job(work: Work) -> Job:
    trainer = make_trainer(work)
    prompts = [ids for ids in work.prompts for _ in range(work.group)]

    def run() -> list[list[int]]:
        return trainer._generate_single_turn(prompts, None, {}, work.group)[0]

    return Job(run, lambda completions: {"new_tokens": [len(ids) for ids in completions]})


def iteration_job(work: Work) -> Job:
    def evidence(log: dict[str, Any]) -> dict[str, list[int]]:
        mean_length = int(log["completions/mean_length"])
        return {"new_tokens": [mean_length] * len(work.completions)}

    return Job(Steps(make_trainer(work)).run, evidence)


JOBS = {
    "score": score_job,
    "update": update_job,
    "rollout": rollout_job,
    "iteration": iteration_job,
}

if __name__ == "__main__":
    serve(JOBS)
    sys.stdout.flush()
    os._exit(0)  # the trainer's thread waits for a next step that does not come
