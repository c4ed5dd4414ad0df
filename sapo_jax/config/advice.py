"""What is allowed, but probably not what was meant: one small generator for each such case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sapo_jax.config.errors import Problem
from sapo_jax.config.objective import DPPO, GRPO, GSPO, SAPO
from sapo_jax.config.pretrained import model_dir_notes
from sapo_jax.config.schema import Config, FileTask, ReasoningGymTask
from sapo_jax.errors import ModelDirError

MANY_MINI_BATCHES = 16
REAL_MODEL_WIDTH = 1024  # hidden_size from which a model counts as a real, pre-trained one


# By objective: the numbers that cannot act where r = 1, and what a sweep over them is called.
GATE_PARAMETERS = {
    "sapo": ("objective.tau_pos and tau_neg", "tau"),
    "grpo": ("objective.clip_low and clip_high", "clip"),
    "gspo": ("objective.clip_low and clip_high", "clip"),
    "cispo": ("objective.clip_low and clip_high", "clip"),
    "vespo": ("objective.c1_pos, c2_pos, c1_neg and c2_neg", "weight"),
    "dppo": ("objective.delta and cap", "delta"),
    "topr": ("the weights of negative sequences", "weight"),
}


def warnings(cfg: Config) -> list[str]:
    """Sentences that begin with the keys they are about and end with what to do."""
    return [str(problem) for advise in ADVICE for problem in advise(cfg)]


def gate_cannot_act(cfg: Config) -> Iterator[Problem]:
    """r = pi / pi_old is 1 at the first optimiser step on a rollout: every gate and every clip is
    the identity there."""
    if cfg.train.mini_batches * cfg.train.epochs > 1:
        return
    parameters, kind_of_sweep = GATE_PARAMETERS[cfg.objective.name]
    rounding = ""
    if cfg.train.old_logp == "sampler":
        rounding = " up to rounding"
    text = (
        f"there is one optimiser step per rollout, so r = 1{rounding} in every update and"
        f" {parameters} change nothing (a {kind_of_sweep} sweep would be a no-op);"
        " set train.mini_batches to 4 (the paper), or train.epochs to 2 or more"
    )
    yield Problem(("train.mini_batches", "train.epochs"), text)


def tau_order(cfg: Config) -> Iterator[Problem]:
    objective = cfg.objective
    if not isinstance(objective, SAPO):
        return
    tau_pos = objective.temperature("pos")
    tau_neg = objective.temperature("neg")
    if tau_neg < tau_pos:
        text = (
            f"tau_neg = {tau_neg:g} is below tau_pos = {tau_pos:g}. A negative"
            " advantage raises the logits of the very many tokens that were not sampled, so its"
            " updates are the noisy ones and the paper has them fade faster off-policy:"
            " tau_neg > tau_pos (arXiv 2511.20347)"
        )
        yield Problem(("objective.tau_neg",), text)


def learning_rate(cfg: Config) -> Iterator[Problem]:
    rate = cfg.optimizer.learning_rate
    if cfg.model.hidden_size >= REAL_MODEL_WIDTH and rate > 1e-4:
        text = f"{rate:g} suits tiny models; RL of pre-trained ones of this size uses about 1e-6"
        yield Problem(("optimizer.learning_rate",), text)


def truncated_sampling(cfg: Config) -> Iterator[Problem]:
    rollout = cfg.rollout
    if rollout.top_k or rollout.top_p < 1 or rollout.min_p > 0:
        text = (
            "completions are drawn from a truncated distribution but scored under the whole one:"
            " the gradient is biased; leave them off for training"
        )
        yield Problem(("rollout.top_k", "rollout.top_p", "rollout.min_p"), text)


def correction(cfg: Config) -> Iterator[Problem]:
    if cfg.loss.correction != "none" and cfg.train.old_logp == "sampler":
        text = (
            "with train.old_logp: sampler the weight exp(old - sampler) is 1 everywhere;"
            " use old_logp: scorer"
        )
        yield Problem(("loss.correction",), text)


def kl_estimator(cfg: Config) -> Iterator[Problem]:
    if cfg.loss.kl == "k1" and cfg.loss.kl_coef > 0:
        text = "the expected gradient of k1 as a loss is 0, it only adds noise; use k3 or k2"
        yield Problem(("loss.kl",), text)


def sequence_ratio(cfg: Config) -> Iterator[Problem]:
    if isinstance(cfg.objective, GSPO) and cfg.loss.normalization != "sequence_mean":
        text = (
            "GSPO's ratio is one per sequence; other normalizations weight sequences by their"
            " length; the paper (arXiv 2507.18071) uses sequence_mean"
        )
        yield Problem(("loss.normalization",), text)


def token_means(cfg: Config) -> Iterator[Problem]:
    """Objectives that are published with a mean over all tokens."""
    papers = {
        "cispo": "CISPO's paper (arXiv 2506.13585) takes the mean over all tokens of a group",
        "vespo": "VESPO's released recipe and TRL take the mean over all tokens (arXiv 2602.10693)",
    }
    paper = papers.get(cfg.objective.name)
    if paper is not None and cfg.loss.normalization == "sequence_mean":
        text = f"{paper}, and sequence_mean gives tokens of long sequences less weight"
        yield Problem(("loss.normalization",), f"{text}; use token_mean")


def sampler_anchor(cfg: Config) -> Iterator[Problem]:
    if isinstance(cfg.objective, DPPO) and cfg.train.old_logp != "sampler":
        text = (
            "DPPO's trust region is around the policy that sampled, and around a recomputed one the"
            " method collapses in its paper (arXiv 2602.04879, Fig. 4); use old_logp: sampler"
        )
        yield Problem(("train.old_logp", "objective.name"), text)


def dual_clip(cfg: Config) -> Iterator[Problem]:
    """The published number of the dual clip is a ratio, and bounds are distances from 1."""
    objective = cfg.objective
    if isinstance(objective, GRPO) and objective.bounds.neg_high == 3.0:
        text = (
            "a bound is a distance from r = 1, so this one closes r > 4; the dual clip that verl"
            " has by default, clip_ratio_c = 3, is neg_high: 2.0"
        )
        yield Problem(("objective.bounds.neg_high",), text)


def old_logp_noise(cfg: Config) -> Iterator[Problem]:
    sigma = cfg.train.old_logp_noise
    if sigma:
        text = (
            f"noise of sd {sigma:g} (1 - pi_old) goes into the denominator of every ratio: this is"
            " for experiments alone; set 0 to train as usual"
        )
        yield Problem(("train.old_logp_noise",), text)


def punished_groups(cfg: Config) -> Iterator[Problem]:
    """The division by the group's std makes a small difference of lengths as large as any other."""
    is_divided = cfg.advantage.kind == "group"
    if cfg.rewards.overlong is not None and is_divided and cfg.rollout.dynamic_sampling is None:
        text = (
            "in a group that is all wrong (or all right) the punishment is the only difference of"
            " rewards, and the division by the group's std blows it up to full size; use"
            " rollout.dynamic_sampling, which drops such groups, or advantage.kind: mean_only"
        )
        yield Problem(("rewards.overlong", "rollout.dynamic_sampling"), text)


def kept_on_device(cfg: Config) -> Iterator[Problem]:
    if cfg.train.routing_on == "device" and cfg.train.mini_batches >= MANY_MINI_BATCHES:
        text = (
            f"the expert ids of {cfg.train.mini_batches} mini-batches wait on the devices at the"
            " same time; use routing_on: host, which sends them with their mini-batch"
        )
        yield Problem(("train.routing_on", "train.mini_batches"), text)


def answer_form(cfg: Config) -> Iterator[Problem]:
    """The cold start teaches the form from which the answer is taken."""
    opening_of = {"answer_tag": "<answer>", "boxed": "\\boxed{"}
    opening = opening_of.get(cfg.rewards.extract, "")
    teaches_response = cfg.cold_start.steps > 0 and cfg.cold_start.demonstrations is None
    if teaches_response and opening not in cfg.cold_start.response:
        text = (
            f"it teaches no {opening}, from which rewards.extract: {cfg.rewards.extract} takes the"
            " answer: every completion would be unparsable"
        )
        yield Problem(("cold_start.response",), text)


def answer_limit(cfg: Config) -> Iterator[Problem]:
    """Where the whole completion may be the answer, a long one is not cut off by `max_chars`.

    A token is about four characters. With `extract: auto` all that follows the thinking is the
    answer where there is no box; that matters to verifiers that read text, not mathematics.
    """
    extract = cfg.rewards.extract
    characters = 4 * cfg.rollout.max_new_tokens
    if characters <= cfg.rewards.max_chars:
        return
    why = ""
    remedy = ""
    if extract in ("all", "final"):
        why = "the whole text is the answer"
        remedy = "use extract: auto, or raise max_chars"
    elif extract == "auto" and any(reads_text(task) for task in cfg.data.tasks):
        why = "an answer without a box is all that follows the thinking"
        remedy = "have answers boxed, or raise max_chars"
    if why:
        text = (
            f"completions of {cfg.rollout.max_new_tokens} tokens have about {characters} characters"
            f" but with extract: {extract} {why}, and one of over {cfg.rewards.max_chars} is"
            f" unparsable; {remedy}"
        )
        yield Problem(("rewards.max_chars", "rollout.max_new_tokens"), text)


def reads_text(task: FileTask | ReasoningGymTask) -> bool:
    """Whether the verifier of a file's rows reads any text, not a number or a formula."""
    return isinstance(task, FileTask) and task.verifier not in ("math", "numeric")


def task_ratios(cfg: Config) -> Iterator[Problem]:
    total_weight = sum(task.weight for task in cfg.data.tasks)
    for position, task in enumerate(cfg.data.tasks):
        exact = cfg.rollout.prompts_per_step * task.weight / total_weight
        if abs(exact - round(exact)) > 0.1 * exact:
            text = (
                f"its weight asks for {exact:.2f} prompts per step, which is rounded to a whole"
                " number; change rollout.prompts_per_step"
            )
            yield Problem((f"data.tasks.{position}.weight",), text)


def never_evaluated(cfg: Config) -> Iterator[Problem]:
    if cfg.evaluate.every > cfg.train.steps:
        text = (
            f"{cfg.evaluate.every} is beyond train.steps = {cfg.train.steps}:"
            " there is no evaluation in between; lower it, or set 0"
        )
        yield Problem(("evaluate.every",), text)


def yarn_reach(cfg: Config) -> Iterator[Problem]:
    yarn = cfg.model.rope_scaling
    if yarn is None:
        return
    positions = cfg.model.max_position_embeddings
    reach = yarn.factor * yarn.original_max_position_embeddings
    if positions > reach:
        text = (
            f"{positions} positions are more than factor * original = {reach:g}, which YaRN was"
            " set for; raise model.rope_scaling.factor"
        )
        yield Problem(("model.max_position_embeddings",), text)


def model_directory(cfg: Config) -> Iterator[Problem]:
    """What config.json of model.path says and the model does not take over."""
    if cfg.model.path is None:
        return
    try:
        notes = model_dir_notes(cfg.model.path)
    except ModelDirError:
        return  # loading the configuration has said so, or nobody needs the directory any more
    for note in notes:
        yield Problem(("model.path",), note)


ADVICE: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    gate_cannot_act,
    tau_order,
    learning_rate,
    truncated_sampling,
    correction,
    kl_estimator,
    sequence_ratio,
    token_means,
    sampler_anchor,
    dual_clip,
    old_logp_noise,
    punished_groups,
    kept_on_device,
    answer_form,
    answer_limit,
    task_ratios,
    never_evaluated,
    yarn_reach,
    model_directory,
)
