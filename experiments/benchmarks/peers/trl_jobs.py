"""TRL's GRPOTrainer on a CPU, with its defaults: fused and chunked LM head, AdamW, `generate` of transformers.

`iteration` and `update` are steps of `trainer.train()`, from on_step_begin to on_log; in `update` the trainer finds its
completions ready. `score` and `rollout` are the methods that the trainer calls for them.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from worker import Job, Work, reward, serve

FOREVER = 10**6  # steps; the driver says when to stop


class Trainer(GRPOTrainer):
    """`prepared`: a batch that takes the place of generated completions. Prompts of the data set are ids as JSON."""

    prepared: dict | None = None

    def _tokenize_prompts(self, prompts):
        return [json.loads(prompt) for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs):
        return (
            dict(self.prepared)
            if self.prepared
            else super()._generate_and_score_completions(inputs)
        )


def make_trainer(work: Work) -> Trainer:
    torch.set_num_threads(os.cpu_count())
    B, C = len(work.completions), len(work.completions[0])
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, seed=0, max_steps=FOREVER, save_strategy="no",
        logging_strategy="steps", logging_steps=1, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=B, gradient_accumulation_steps=1, gradient_checkpointing=False,
        num_generations=work.group, max_completion_length=C, generation_kwargs={"min_new_tokens": C},
        loss_type="grpo", beta=0.0, epsilon=work.clip, learning_rate=work.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=work.max_grad_norm, adam_beta2=0.95, weight_decay=0.0, router_aux_loss_coef=0.0,
    )  # fmt: skip
    return Trainer(
        AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        args,
        Dataset.from_dict({"prompt": [json.dumps(ids) for ids in work.prompts]}),
        processing_class=AutoTokenizer.from_pretrained(work.model),
    )


class Steps(TrainerCallback):
    """Lets `trainer.train()`, in a thread of its own, take one step for each call of `run`."""

    def __init__(self, trainer: Trainer):
        self._go, self._done = queue.Queue(), queue.Queue()
        trainer.add_callback(self)
        self._trainer = trainer
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

    def run(self) -> dict:
        """The log of the step."""
        self._go.put(None)
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        return found


def tensors(work: Work) -> dict[str, torch.Tensor]:
    S, B = len(work.prompts[0]), len(work.completions)
    ids = torch.tensor(work.sequences)
    return {
        "prompt_ids": ids[:, :S],
        "prompt_mask": torch.ones(B, S, dtype=torch.long),
        "completion_ids": ids[:, S:],
        "completion_mask": torch.ones(B, ids.shape[1] - S, dtype=torch.long),
        "old_per_token_logps": torch.tensor(work.old_logp),
        "advantages": torch.tensor(work.advantages),
        "num_items_in_batch": torch.tensor(ids[:, S:].numel()),
    }


def score_job(work: Work) -> Job:
    trainer, ids_BT, C = make_trainer(work), torch.tensor(work.sequences), len(work.completions[0])

    @torch.no_grad()
    def run():
        mask = torch.ones_like(ids_BT)
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids_BT, mask, C, len(ids_BT)
        )[0]

    return Job(run, lambda logp_BC: {"logp": logp_BC.tolist()})


def update_job(work: Work) -> Job:
    trainer = make_trainer(work)
    trainer.prepared = tensors(work)
    return Job(
        Steps(trainer).run, lambda log: {name: float(log[name]) for name in ("loss", "grad_norm")}
    )


def rollout_job(work: Work) -> Job:
    trainer = make_trainer(work)
    prompts = [ids for ids in work.prompts for _ in range(work.group)]
    run = lambda: trainer._generate_single_turn(prompts, None, {}, work.group)[0]
    return Job(run, lambda found: {"new_tokens": [len(ids) for ids in found]})


def iteration_job(work: Work) -> Job:
    mean_length = "completions/mean_length"
    return Job(
        Steps(make_trainer(work)).run,
        lambda log: {"new_tokens": [int(log[mean_length])] * len(work.completions)},
    )


if __name__ == "__main__":
    serve(
        {
            "score": score_job,
            "update": update_job,
            "rollout": rollout_job,
            "iteration": iteration_job,
        }
    )
    sys.stdout.flush()
    os._exit(0)  # the trainer's thread waits for a next step that does not come
