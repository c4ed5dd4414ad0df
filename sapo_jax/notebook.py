"""What a notebook needs beside the objectives: configurations and policies, opened in one line.

    import sapo_jax as sj

    policy = sj.open_policy("runs/quickstart")        # or a Hugging Face model directory
    policy.sample(["Calculate 3 + 4."], n=4)
    policy.score("Calculate 3 + 4.", "7")

A policy opened here is on one device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from sapo_jax import config
from sapo_jax.batch import Batch, Params
from sapo_jax.config import Config, ConfigError
from sapo_jax.config.load import resolve
from sapo_jax.data import Tokenizer, load_tokenizer
from sapo_jax.distributed.sharding import make_mesh
from sapo_jax.errors import RunError
from sapo_jax.io.files import CONFIG
from sapo_jax.learner.scoring import ScorerOutput, make_scorer
from sapo_jax.models import Policy, make_policy
from sapo_jax.rollout import SamplingParams, pad_sequences
from sapo_jax.training.evaluate import prompt_of
from sapo_jax.training.experience import make_sampler
from sapo_jax.training.run import trained_params
from sapo_jax.types import Prompt


def load_config(path: str | Path, *overrides: str) -> Config:
    """The configuration of a YAML file, or of a run's folder, with `key.path=value` overrides.

    Raises ConfigError with all that is wrong with it.
    """
    return config.load_file_or_run(path, overrides)


@dataclasses.dataclass(frozen=True)
class OpenPolicy:
    """A policy with its parameters and tokenizer, to sample from and to score with."""

    cfg: Config
    policy: Policy
    params: Params
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh

    def sample(
        self,
        questions: Sequence[str],
        n: int = 1,
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]:
        """n completions of each question, decoded; temperature 0 gives the most probable tokens.

        Questions are rendered with the chat template of the configuration. A completion ends at
        rollout.max_new_tokens. Raises RunError for a question that is too long.
        """
        prompts = [self.prompt(question, i) for i, question in enumerate(questions)]
        sampling = SamplingParams(temperature=temperature)
        sampler = make_sampler(self.cfg, self.policy, self.tokenizer, sampling, n)
        with jax.set_mesh(self.mesh):
            rollout = sampler(self.params, prompts, jax.random.key(seed))
        texts = []
        for token_ids, length in zip(rollout.tokens_BC, rollout.length_B, strict=True):
            texts.append(self.tokenizer.decode(token_ids[:length]))
        return [texts[start : start + n] for start in range(0, len(texts), n)]

    def score(self, question: str, completion: str, *, temperature: float = 1.0) -> np.ndarray:
        """The log-probability of each token of the completion, float32 [number of tokens].

        The tokens are those of the completion's text alone, without a stop token. Raises RunError
        for a question that is too long.
        """
        prompt = self.prompt(question)
        completion_ids = self.tokenizer.encode(completion)
        sequence = ([*prompt.ids, *completion_ids], len(prompt.ids))
        rows = pad_sequences([sequence], self.tokenizer.pad_id)
        unused_BT = np.zeros(rows["mask_BT"].shape, np.float32)
        batch = Batch(**rows, adv_BT=unused_BT, weight_BT=unused_BT)
        scorer = _scorer(self.policy, temperature)
        with jax.set_mesh(self.mesh):
            logp_BT = np.asarray(scorer(self.params, batch).logp_BT)
        return logp_BT[rows["mask_BT"]]

    def prompt(self, question: str, index: int = 0) -> Prompt:
        """The question as the model sees it. Raises RunError where it is too long.

        index: prompts of different indices draw different random numbers.
        """
        return prompt_of(self.cfg.data, self.tokenizer, question, index)


def open_policy(folder: str | Path, *overrides: str, step: int | None = None) -> OpenPolicy:
    """The policy of a run's folder, or of a Hugging Face model directory, on one device.

    Of a run: the newest checkpoint, RL before cold start, or that of RL step `step`; its own
    configuration with the overrides. Of a model directory: its config.json, tokenizer and chat
    template, and the defaults of the configuration for all else. Neither data nor verifiers are
    needed. Raises RunError, ConfigError, CheckpointError, ModelDirError.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        cfg = load_config(folder, *overrides)
    elif (folder / "config.json").exists():
        cfg = _config_of_model_dir(folder, overrides)
    else:
        raise RunError(
            f"{folder} is neither the folder of a run (with config.yaml) nor a Hugging Face model "
            "directory (with config.json)"
        )
    cfg = dataclasses.replace(cfg, mesh=config.Mesh(data=1))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    mistakes = config.vocabulary_mistakes(cfg, tokenizer.vocab_size)
    if mistakes:
        raise ConfigError(mistakes, str(folder))
    cfg = config.with_vocabulary(cfg, tokenizer.vocab_size)
    mesh = make_mesh(cfg.mesh)
    policy = make_policy(cfg.model)
    with jax.set_mesh(mesh):
        trained = trained_params(cfg, folder, policy, mesh, step)
    return OpenPolicy(cfg, policy, trained.params, tokenizer, mesh)


@functools.lru_cache(maxsize=16)
def _scorer(policy: Policy, temperature: float) -> Callable[[Params, Batch], ScorerOutput]:
    """A scorer of one row. It is kept, so that scores of one length share a compiled program."""
    return make_scorer(policy, temperature, micro_batch=0)


def _config_of_model_dir(folder: Path, overrides: Sequence[str]) -> Config:
    """The defaults, with the model and the tokenizer of the directory. Raises ConfigError."""
    cfg, problems = resolve([{"name": folder.name, "model": {"path": str(folder)}}], overrides)
    # There is nothing to train on, and nothing is trained.
    problems = [problem for problem in problems if problem.keys != ("data.tasks",)]
    if problems:
        raise ConfigError(problems, str(folder))
    return cfg
