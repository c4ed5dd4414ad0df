"""What is allowed, but probably not what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sapo_jax.config.schema import GSPO, SAPO, Config

WIDE = 1024  # hidden_size from which a model counts as a real one


def warnings(cfg: Config) -> list[str]:
    """Sentences that begin with the keys they are about and end with what to do."""
    return [f"{keys}: {text}" for advise in ADVICE for keys, text in advise(cfg)]


def gate_cannot_act(cfg: Config) -> Iterator[tuple[str, str]]:
    """r = pi / pi_old is 1 at the first optimiser step on a rollout; every gate and clip is the identity there."""
    if cfg.train.mini_batches * cfg.train.epochs > 1:
        return
    names = "tau_pos and tau_neg" if isinstance(cfg.objective, SAPO) else "clip_low and clip_high"
    start = (
        "r = 1 in every update"
        if cfg.train.old_logp == "scorer"
        else "r = 1 up to rounding in every update"
    )
    text = (
        f"there is one optimiser step per rollout, so {start} and objective.{names} change nothing"
        f" (a {'tau' if isinstance(cfg.objective, SAPO) else 'clip'} sweep would be a no-op);"
        " set train.mini_batches to 4 (the paper), or train.epochs to 2 or more"
    )
    yield "train.mini_batches, train.epochs", text


def tau_order(cfg: Config) -> Iterator[tuple[str, str]]:
    objective = cfg.objective
    if isinstance(objective, SAPO) and objective.tau_neg < objective.tau_pos:
        text = (
            f"tau_neg = {objective.tau_neg:g} is below tau_pos = {objective.tau_pos:g}. A negative advantage raises the"
            " logits of the very many tokens that were not sampled, so its updates are the noisy ones and the paper has"
            " them fade faster off-policy: tau_neg > tau_pos (arXiv 2511.20347)"
        )
        yield "objective.tau_neg", text


def learning_rate(cfg: Config) -> Iterator[tuple[str, str]]:
    if cfg.model.hidden_size >= WIDE and cfg.optimizer.learning_rate > 1e-4:
        text = f"{cfg.optimizer.learning_rate:g} suits tiny models; RL of pre-trained ones of this size uses about 1e-6"
        yield "optimizer.learning_rate", text


def truncated_sampling(cfg: Config) -> Iterator[tuple[str, str]]:
    rollout = cfg.rollout
    if rollout.top_k or rollout.top_p < 1 or rollout.min_p > 0:
        text = "completions are drawn from a truncated distribution but scored under the whole one"
        yield (
            "rollout.top_k, top_p, min_p",
            f"{text}: the gradient is biased; leave them off for training",
        )


def correction(cfg: Config) -> Iterator[tuple[str, str]]:
    if cfg.loss.correction != "none" and cfg.train.old_logp == "sampler":
        text = "with train.old_logp: sampler the weight exp(old - sampler) is 1 everywhere; use old_logp: scorer"
        yield "loss.correction", text


def kl_estimator(cfg: Config) -> Iterator[tuple[str, str]]:
    if cfg.loss.kl == "k1" and cfg.loss.kl_coef > 0:
        yield (
            "loss.kl",
            "the expected gradient of k1 as a loss is 0, it only adds noise; use k3 or k2",
        )


def sequence_ratio(cfg: Config) -> Iterator[tuple[str, str]]:
    if isinstance(cfg.objective, GSPO) and cfg.loss.normalization != "sequence_mean":
        text = "GSPO's ratio is one per sequence; other normalizations weight sequences by their length"
        yield "loss.normalization", f"{text}; the paper (arXiv 2507.18071) uses sequence_mean"


def answer_form(cfg: Config) -> Iterator[tuple[str, str]]:
    needed = {"answer_tag": "<answer>", "boxed": "\\boxed{"}.get(cfg.rewards.extract, "")
    if (
        cfg.cold_start.steps
        and cfg.cold_start.demonstrations is None
        and needed not in cfg.cold_start.response
    ):
        text = f"it teaches no {needed}, from which rewards.extract: {cfg.rewards.extract} takes the answer"
        yield "cold_start.response", f"{text}: every completion would be unparsable"


def task_ratios(cfg: Config) -> Iterator[tuple[str, str]]:
    total = sum(task.weight for task in cfg.data.tasks)
    for i, task in enumerate(cfg.data.tasks):
        exact = cfg.rollout.prompts_per_step * task.weight / total
        if abs(exact - round(exact)) > 0.1 * exact:
            text = f"its weight asks for {exact:.2f} prompts per step, which is rounded to a whole number"
            yield f"data.tasks.{i}.weight", f"{text}; change rollout.prompts_per_step"


def never_evaluated(cfg: Config) -> Iterator[tuple[str, str]]:
    if cfg.evaluate.every > cfg.train.steps:
        text = f"{cfg.evaluate.every} is beyond train.steps = {cfg.train.steps}: there is no evaluation in between"
        yield "evaluate.every", f"{text}; lower it, or set 0"


def yarn_reach(cfg: Config) -> Iterator[tuple[str, str]]:
    yarn = cfg.model.rope_scaling
    if (
        yarn
        and cfg.model.max_position_embeddings > yarn.factor * yarn.original_max_position_embeddings
    ):
        reach = yarn.factor * yarn.original_max_position_embeddings
        text = f"{cfg.model.max_position_embeddings} positions are more than factor * original = {reach:g}"
        yield (
            "model.max_position_embeddings",
            f"{text}, which YaRN was set for; raise model.rope_scaling.factor",
        )


ADVICE: tuple[Callable[[Config], Iterator[tuple[str, str]]], ...] = (
    gate_cannot_act, tau_order, learning_rate, truncated_sampling, correction, kl_estimator, sequence_ratio,
    answer_form, task_ratios, never_evaluated, yarn_reach,
)  # fmt: skip
