"""The glossary of metrics: what each one means, which values are healthy, and what to do if not.

`GLOSSARY` is the only place where this is written down. `sapo-jax metrics [NAME]` prints it
(`describe_metric`), and the table in this folder's README.md is made from it (`write_page`). Tests
check that the page is up to date and that every metric that a run logs is in the glossary.

To add a metric, add an entry here, and then write the page anew:

    python -c "from sapo_jax.diagnostics.glossary import write_page; write_page()"
"""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from sapo_jax.diagnostics.quadrants import MASK_QUANTILES
from sapo_jax.errors import UserError
from sapo_jax.io.files import write_atomically
from sapo_jax.text import did_you_mean

PAGE = Path(__file__).with_name("README.md")
TABLE_BEGINS = "<!-- The glossary begins: made from glossary.py by write_page(). -->"
TABLE_ENDS = "<!-- The glossary ends. -->"
WIDTH = 100  # columns of what is printed


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """A part of a name that differs from metric to metric, written {so} in the glossary."""

    regex: str
    meaning: str
    examples: tuple[str, ...]  # what is offered for a name that was mistyped


PLACEHOLDERS = {
    "group": Placeholder(
        regex="(?:pos_|neg_)?",
        meaning="nothing: all trained tokens; `pos_`: those with A > 0; `neg_`: those with A < 0",
        examples=("", "pos_", "neg_"),
    ),
    "quadrant": Placeholder(
        regex="(?:pos|neg)_(?:below|above)",
        meaning="`pos_below`, `pos_above`, `neg_below` or `neg_above`: the sign of A, and r < 1 or "
        "r > 1 (of sequences: s_i = exp(mean log r)); an r of 1 exactly is in none of them",
        examples=("pos_below", "pos_above", "neg_below", "neg_above"),
    ),
    "sign": Placeholder(
        regex="(?:pos|neg)",
        meaning="`pos`: tokens with A > 0; `neg`: tokens with A < 0",
        examples=("pos", "neg"),
    ),
    "task": Placeholder(
        regex=".+",
        meaning="the name of a task; there where a run has more than one",
        examples=(),
    ),
    "layer": Placeholder(
        regex=r"\d+",
        meaning="the index of a layer of the model, from 0",
        examples=("0",),
    ),
    "update": Placeholder(
        regex=r"\d+",
        meaning="the index of an optimiser step within its RL step, from 0",
        examples=("0",),
    ),
    "percent": Placeholder(
        regex=r"\d\d",
        meaning="01, 05, 25, 50, 75, 95 or 99",
        examples=("50",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One or several metrics that are read together."""

    names: tuple[str, ...]  # with placeholders
    meaning: str
    healthy: str = ""
    otherwise: str = ""  # what to do, or where to look, if the value is not healthy

    def is_of(self, name: str) -> bool:
        """Whether this entry explains the metric of that name."""
        return any(_regex(pattern).fullmatch(name) for pattern in self.names)


@dataclasses.dataclass(frozen=True)
class Section:
    """Entries about one subject."""

    title: str
    entries: tuple[Entry, ...]


_SMALLER_STEPS = (
    "the policy moves too far within a step: lower `optimizer.learning_rate`, or "
    "`train.mini_batches`"
)

GLOSSARY = (
    Section(
        "Each row",
        (
            Entry(
                ("stage", "step"),
                "which row this is: `cold_start` with the optimiser step, or `rl` with the RL step "
                "(0 is the evaluation before the first one)",
            ),
        ),
    ),
    Section(
        "Reward and accuracy",
        (
            Entry(
                ("reward/mean", "accuracy/mean"),
                "mean reward, and share of correct answers, over the completions of the rollout "
                "whose verifier worked",
                "rises",
                "look at `samples.jsonl`; lower `optimizer.learning_rate` if it falls from the "
                "start",
            ),
            Entry(
                ("reward/std",),
                "standard deviation of the reward over the same completions",
                "above 0",
                "at 0 all completions are worth the same: there is nothing to learn from",
            ),
            Entry(
                ("accuracy/token",),
                "cold start: share of the response tokens that are the most probable ones under "
                "the model",
                "rises towards what the task allows",
                "more `cold_start.steps`, or a higher `cold_start.optimizer.learning_rate`",
            ),
            Entry(
                ("accuracy/{task}",),
                "share of correct answers of one task, over all its completions (one whose "
                "verifier failed counts as wrong)",
                "rises",
                "one task alone stays behind: its weight in the mixture, or its difficulty",
            ),
            Entry(
                ("reward/overlong_penalty_mean", "reward/overlong_fraction"),
                "mean length penalty (`rewards.overlong`), which is added to the reward and is not "
                "in `reward/mean`; share of the completions that have any",
                "near 0",
                "falls: completions grow to the limit; a larger `rollout.max_new_tokens`",
            ),
            Entry(
                ("groups/no_signal_fraction",),
                "share of the groups of the updates whose rewards are all equal: they give no "
                "gradient",
                "below 0.5; 0 with dynamic sampling",
                "near 1: the problems are too easy or too hard; take a larger group size G, or "
                "`rollout.dynamic_sampling`",
            ),
            Entry(
                ("groups/no_signal_in_row",),
                "how many steps in a row, up to this one, had no group with a preference",
                "0",
                "at `train.no_signal_steps` the run says that it is dead, and what to do",
            ),
        ),
    ),
    Section(
        "Dynamic sampling",
        (
            Entry(
                ("groups/rounds", "groups/drawn"),
                "rounds of prompts in this step, and groups in all of them. Reward, accuracy, "
                "lengths and verifier statuses of the step are over all these groups",
                "1 to 3 rounds",
                "many rounds: the problems are too easy or too hard, and most of the rollout is "
                "thrown away",
            ),
            Entry(
                ("groups/mixed", "groups/surplus"),
                "drawn groups with both right and wrong completions, which are kept; those of "
                "them that were more than the batch needs, and were dropped",
            ),
            Entry(
                ("groups/all_correct", "groups/all_wrong", "groups/failed"),
                "drawn groups that were dropped: all right, all wrong, or without both because of "
                "failed verifiers",
                "failed: 0",
                "many all right: harder problems; many all wrong: easier ones",
            ),
            Entry(
                ("groups/missing",),
                "places of the batch that no round had a group for: nothing is trained on there",
                "0",
                "more `rollout.dynamic_sampling.max_rounds`, or other problems",
            ),
        ),
    ),
    Section(
        "Held-out problems",
        (
            Entry(
                ("held_out/avg", "held_out/pass"),
                "avg@k and pass@k on problems never trained on: mean correctness over problems "
                "and their k samples; share of the problems with at least one correct sample",
                "rises with `accuracy/mean`",
                "a growing gap to `accuracy/mean`: overfitting; take more problems",
            ),
            Entry(
                ("held_out/avg/{task}",),
                "avg@k over the held-out problems of one task",
                "rises with `accuracy/{task}`",
                "as above",
            ),
            Entry(
                ("held_out/stderr", "held_out/ci_low", "held_out/ci_high"),
                "standard error of avg@k over problems (the k samples of a problem are not "
                "independent), and its 95 % interval by the percentile bootstrap over problems",
                "narrower than the differences that are to be told",
                "more problems: `data.held_out`",
            ),
            Entry(
                ("held_out/problems", "held_out/samples"),
                "how many problems were evaluated, and how many completions of them",
            ),
            Entry(
                ("held_out/verifier_failures",),
                "completions whose verifier failed; they count as wrong, because a failing "
                "verifier must not improve a score",
                "0",
                "`rewards.deadline`, `rewards.memory_mb`, or the verifier",
            ),
            Entry(
                ("held_out/length_mean",),
                "mean number of tokens of these completions",
                "as `completion/length_mean`",
            ),
        ),
    ),
    Section(
        "Completions and verifiers",
        (
            Entry(
                ("completion/length_mean", "completion/length_max"),
                "mean and largest number of tokens of a completion",
                "mean far below `rollout.max_new_tokens`",
                "raise `rollout.max_new_tokens`",
            ),
            Entry(
                ("completion/truncated_fraction",),
                "share of the completions that were cut off at `rollout.max_new_tokens`",
                "below 0.1",
                "raise `rollout.max_new_tokens`",
            ),
            Entry(
                ("verifier/error_fraction",),
                "share of the completions that are masked because their verifier failed",
                "0",
                "`rewards.memory_mb`, or the verifier (the log names file and line)",
            ),
            Entry(
                ("verifier/error_steps_in_row",),
                "how many steps in a row, up to this one, had more errors than "
                "`train.max_error_fraction`",
                "0",
                "the run stops at `train.max_error_steps`, with the last error",
            ),
            Entry(
                ("verifier/timeout_fraction",),
                "share of the completions whose answer kept the verifier busy until "
                "`rewards.deadline`; their reward is 0",
                "0",
                "`rewards.deadline`; `rewards.on_timeout: mask` where it is not the answer's fault",
            ),
            Entry(
                ("verifier/unparsable_fraction",),
                "share of the completions without an answer; their reward is 0",
                "falls early",
                "a cold start; `rewards.extract`",
            ),
        ),
    ),
    Section(
        "Ratio and gate of the tokens",
        (
            Entry(
                ("tokens/{group}count",),
                "trained tokens, over all updates of the step",
                "both signs have tokens",
                "where it is 0, the other statistics of that sign are not in the row",
            ),
            Entry(
                ("ratio/{group}mean", "ratio/{group}min", "ratio/{group}max"),
                "the ratio r of the probabilities that the new and the old policy give a token "
                "(gspo: s_i, that of the sequence)",
                "mean 1; extremes within 0.1 to 10",
                f"extremes grow: {_SMALLER_STEPS}",
            ),
            Entry(
                ("gate/{group}mean",),
                "the gate f'(r) (hard clips: share of the tokens that are not clipped)",
                "0.9 to 1",
                f"low: {_SMALLER_STEPS}",
            ),
            Entry(
                ("grad_weight/{group}mean",),
                "the gradient weight r f'(r), the factor on A grad log pi",
                "near 1",
                _SMALLER_STEPS,
            ),
            Entry(
                ("clip_fraction/{group}mean",),
                "share of the tokens whose gradient a hard clip, bound or mask removes; 0 with "
                "SAPO alone",
                "GRPO below 0.05; GSPO higher",
                _SMALLER_STEPS,
            ),
            Entry(
                ("surrogate/centered_{group}mean",),
                "the surrogate minus its value at r = 1; unlike the surrogate itself, its mean "
                "tells progress",
                "slightly positive",
                "negative for long: the steps are too large",
            ),
        ),
    ),
    Section(
        "Entropy and KL",
        (
            Entry(
                ("entropy/{group}mean",),
                "entropy of the policy at the tokens, in nats per token",
                "falls slowly",
                "collapses to 0 while the reward is flat: a lower learning rate, or a KL penalty",
            ),
            Entry(
                ("kl/old_k3_{group}mean",),
                "KL(old, policy) per token within the step, in nats, by the estimator k3",
                "below 0.02",
                _SMALLER_STEPS,
            ),
            Entry(
                ("kl/reference_{group}mean",),
                "KL(policy, reference) per token, in nats, by the estimator of `loss.kl`; there "
                "where `loss.kl_coef` > 0",
                "grows slowly, and levels off",
                "a larger `loss.kl_coef` holds the policy nearer to the reference",
            ),
            Entry(
                ("sequence_mask/fraction", "sequence_mask/neg_fraction"),
                "share of the sequences that `loss.sequence_mask` leaves out: of all, and of those "
                "with A < 0; there where it is set",
                "small; 0 everywhere is a mask that does nothing",
                "near 0: lower its `below`; a large part of those with A < 0: raise it, or lower "
                "`train.mini_batches` or `optimizer.learning_rate`",
            ),
            Entry(
                ("sequence_mask/grad_share",),
                "share of the gradient that those sequences would have had: the loss weight times "
                "the size of A times `grad_weight`, summed over their tokens and over all",
                "above `sequence_mask/fraction` where long or far sequences are left out",
            ),
        ),
    ),
    Section(
        "A1: small steps",
        (
            Entry(
                (
                    "a1/abs_log_ratio_p50",
                    "a1/abs_log_ratio_p99",
                    "a1/abs_log_ratio_mean",
                    "a1/abs_log_ratio_max",
                ),
                "abs log r of the tokens: median, 99 % quantile, mean, largest; A1 wants it small",
                "p99 below 0.3 (quickstart: 1, it takes large steps)",
                _SMALLER_STEPS,
            ),
            Entry(
                ("a1/gate_error_mean",),
                "abs f'(r) - sech^2(tau/2 log r), mean over tokens: what it costs to take r - 1 "
                "for log r",
                "below 0.01",
                _SMALLER_STEPS,
            ),
        ),
    ),
    Section(
        "A2: little dispersion within a sequence",
        (
            Entry(
                ("a2/variance_mean", "a2/variance_max"),
                "Var_i, the variance of log r over the tokens of a sequence: mean over sequences, "
                "largest; A2 wants it small",
                "mean below 0.05 (quickstart: 0.03)",
                f"{_SMALLER_STEPS}; in a MoE, the experts change between the passes: see "
                "`router/...`",
            ),
            Entry(
                ("a2/gap_log_mean", "a2/gap_real_mean", "a2/bound_mean"),
                "D_i, the distance of the mean of a sequence's token gates from one gate for the "
                "sequence: of the log gate, of f'(r); and tau^2/4 Var_i, the bound of the first",
                "far below 1",
                "near 0.1: the token gates no longer act as one gate of the sequence",
            ),
            Entry(
                ("a2/breaches",),
                "sequences whose D_i of the log gate is above the bound, rounding apart",
                "0, always",
                "a bug: report it",
            ),
            Entry(
                ("a2/gap_real_above_bound_fraction",),
                "share of the sequences whose D_i of f'(r) is above the bound, which does not "
                "hold for that gate",
                "any; about half of those that moved",
                "nothing to do: near r = 1 both are equal, and skew decides",
            ),
        ),
    ),
    Section(
        "Where the gradient comes from",
        (
            Entry(
                ("effective_tokens/{group}fraction",),
                "(sum w)^2 / (n sum w^2) of the gradient weights w = r f'(r), over n trained "
                "tokens",
                "above 0.9",
                "few tokens carry the update: the steps are too large",
            ),
            Entry(
                ("grad_share/grpo_clipped", "grad_share/gspo_clipped"),
                "part of SAPO's summed gradient norms on the logits that is at tokens whose "
                "gradient that hard clip zeroes",
                "GRPO below 0.1; GSPO any",
                "GRPO's is large: the gate does what a clip would, softly; the steps are large",
            ),
            Entry(
                (
                    "grad_share/grpo_clipped_above",
                    "grad_share/grpo_clipped_below",
                    "grad_share/gspo_clipped_above",
                    "grad_share/gspo_clipped_below",
                ),
                "the same on either side of the clip's band: above it the tokens with A > 0, below "
                "it those with A < 0",
                "",
                "below is large: tokens with A < 0 are pushed further down after the ratio has "
                "left the band: see `quadrant/neg_below/grad_share`",
            ),
            Entry(
                ("grad_share/grpo_outside", "grad_share/gspo_outside"),
                "the same at all tokens out of the band, on either side",
                "",
                "as above",
            ),
        ),
    ),
    Section(
        "Quadrants: sign of A by side of r",
        (
            Entry(
                ("quadrant/{quadrant}/token_fraction",),
                "share of the trained tokens that are in the quadrant; the rest has r = 1, as in "
                "the first of the N updates of a rollout, or A = 0",
                "both sides of a sign alike",
                "one sign is rare: rewards of almost all or almost no completion are good",
            ),
            Entry(
                ("quadrant/{quadrant}/outside_fraction",),
                "share of the quadrant's tokens that are outside of GRPO's band (`objective` of a "
                "GRPO run, else 0.8 to 1.27)",
                "below 0.05",
                _SMALLER_STEPS,
            ),
            Entry(
                ("quadrant/{quadrant}/gate_mean", "quadrant/{quadrant}/grad_weight_mean"),
                "mean over the quadrant's tokens of the gate and of the weight w on A grad log pi, "
                "both of the objective in use (SAPO: f'(r) and r f'(r); GRPO: 0 and 0 where it "
                "clips)",
                "near 1",
                "w far above 1 where A < 0, r > 1: that side is open, as GRPO's is; w near r where "
                "A < 0, r < 1: nothing holds the tokens that are pushed down, as with SAPO at tau "
                "near 1",
            ),
            Entry(
                ("quadrant/{quadrant}/grad_share",),
                "the quadrant's share of the summed gradient norms on the logits, of the objective "
                "in use (without the KL penalty)",
                "as the shares of the tokens",
                "`neg_below` grows over training: the update is spent on tokens that already fall; "
                "lower `train.mini_batches`, or close that side: `objective.tau_neg_below`, or "
                "`objective.bounds` with neg_low",
            ),
            Entry(
                ("quadrant/{quadrant}/kl_share",),
                "the quadrant's share of KL(old, policy), by the estimator k3",
                "no quadrant above 0.6",
                "one quadrant has nearly all: that is where the policy drifts; see its "
                "`outside_fraction`",
            ),
            Entry(
                ("sequence_quadrant/{quadrant}/sequence_fraction",),
                "the same by sequence, sign of A by side of s_i = exp(mean log r): share of the "
                "sequences",
                "both sides of a sign alike",
                "as above",
            ),
            Entry(
                ("sequence_quadrant/{quadrant}/outside_fraction",),
                "share of the quadrant's sequences whose s_i is outside of GSPO's band "
                "(`objective` of a GSPO run, else 0.9997 to 1.0004)",
                "any; the band is narrow",
                "nothing to do: see `sequence/neg_mean_log_ratio_p05` for how far they are",
            ),
            Entry(
                (
                    "sequence_quadrant/{quadrant}/gate_mean",
                    "sequence_quadrant/{quadrant}/grad_weight_mean",
                    "sequence_quadrant/{quadrant}/grad_share",
                    "sequence_quadrant/{quadrant}/kl_share",
                ),
                "of the quadrant's sequences: the mean of the means over their tokens of gate and "
                "weight, and their tokens' share of the gradient norms and of KL(old)",
                "as of the tokens",
                "as of the tokens",
            ),
            Entry(
                tuple(f"sequence/neg_mean_log_ratio_{ending}" for ending in MASK_QUANTILES),
                "quantiles of mean log r over the sequences with A < 0, to within a bin of 12 %: a "
                "sequence mask of delta takes those below -delta (where the old policy is the "
                "sampler)",
                "p05 above -0.2",
                "far below 0: whole answers are being unlearnt; set `loss.sequence_mask`, with "
                "`below` between -p25 and -p01, or lower `train.mini_batches`",
            ),
        ),
    ),
    Section(
        "Sampler against scorer",
        (
            Entry(
                ("mismatch/mean", "mismatch/max"),
                "abs difference of the log-probs that sampler and scorer give the same tokens, in "
                "nats: mean, largest (without a scoring pass, `train.old_logp=sampler`: only the "
                "largest, from the ratios of the first update)",
                "1e-6 in float32, 1e-2 in bfloat16",
                "larger: a bug, or a truncated sampling distribution",
            ),
            Entry(
                ("mismatch/live_mean", "mismatch/live_max"),
                "the same without routing replay (r3, every `train.live_mismatch_every` steps)",
                "above `mismatch/mean` where routing differs",
            ),
            Entry(
                ("old_logp_noise/sigma", "old_logp_noise/mean", "old_logp_noise/max"),
                "`train.old_logp_noise`, for experiments: sigma, and mean and largest abs noise in "
                "the log-probs of the ratio's denominator, in nats. `mismatch/*` is without it, "
                "but for `train.old_logp=sampler`, where the sampler's own log-probs have it",
                "not there",
                "the run is an experiment: `train.old_logp_noise` is set",
            ),
        ),
    ),
    Section(
        "Packed rows",
        (
            Entry(
                ("rows/fill", "rows/count", "rows/length"),
                "the rows that a rollout is packed into: share of their slots that hold a token, "
                "their number, their length in tokens",
                "fill above 0.7",
                "`train.row_tokens`; or the lengths vary widely",
            ),
            Entry(
                ("rows/shapes",),
                "how many shapes the rows of the run have had so far: for each, the programs that "
                "score and update are compiled once, which shows in `time/score` and `time/update`",
                "a few, which come early",
                "`train.row_tokens` fixes the length of the rows",
            ),
        ),
    ),
    Section(
        "Loss and optimiser",
        (
            Entry(
                ("loss",),
                "cold start: cross-entropy per response token, in nats, plus the router's aux "
                "loss. RL: mean over the updates of the step; its value tells little, because "
                "SAPO's surrogate is 2/tau at r = 1: look at `surrogate/centered_mean`",
                "cold start: falls",
                "cold start: `cold_start.optimizer.learning_rate`",
            ),
            Entry(
                ("grad_norm",),
                "norm of the gradient before clipping (RL: mean over the updates of the step that "
                "were not skipped; 0 where all were)",
                "steady",
                "spikes: a warm-up, a lower `optimizer.max_grad_norm`, or float32",
            ),
            Entry(
                ("updates/skipped",),
                "updates of the step that were skipped because their mini-batch had no signal: "
                "every sample failed, or every advantage is 0 and no KL penalty is on. Parameters, "
                "moments and the schedule stay as they are",
                "0",
                "as for `groups/no_signal_fraction`, or smaller `train.mini_batches`",
            ),
            Entry(
                ("learning_rate",),
                "of the newest update that was applied; one that is skipped does not advance the "
                "schedule",
                "as `optimizer.schedule` says",
            ),
            Entry(
                ("nonfinite/total", "nonfinite/in_row"),
                "updates that were skipped because their gradient was not finite: in all, and "
                "the last ones in a row",
                "0",
                "a lower learning rate or `optimizer.max_grad_norm`, or float32; the run stops at "
                "`train.max_nonfinite` in a row",
            ),
        ),
    ),
    Section(
        "Experts",
        (
            Entry(
                ("router/load_max", "router/aux_loss"),
                "load of the busiest expert over the mean load; aux loss of all tokens together, "
                "1 if they are balanced",
                "load below 2 to 3; aux loss near 1",
                "`model.router_aux_loss_coef`",
            ),
            Entry(
                (
                    "router/replay_difference_mean",
                    "router/replay_difference_max",
                    "replay_difference/layer_{layer}",
                ),
                "share of the k experts that the live router chooses which are not among the "
                "replayed ones: mean and largest over layers, and by layer",
                "r2: 0 in the first update (bfloat16: rounding), then small",
                "grows: the router moves fast; lower the learning rate",
            ),
        ),
    ),
    Section(
        "Seconds",
        (
            Entry(
                ("time/rollout", "time/score", "time/verify", "time/update"),
                "the phases of an RL step. Verifiers work beside the scoring pass: `time/verify` "
                "is what is left of that after `time/score`",
                "rollout and update take most of it; verify near 0",
                "verify is long: more `rewards.workers`",
            ),
            Entry(("time/step",), "the whole step, without evaluation and saving"),
            Entry(("time/eval",), "the evaluation on the held-out problems"),
            Entry(
                ("time/checkpoint",),
                "how long the save after the previous step held up training; writing goes on in "
                "the background",
                "small beside `checkpoint.every` steps",
                "a larger `checkpoint.every`",
            ),
        ),
    ),
    Section(
        "Columns of `read_diagnostics` alone",
        (
            Entry(
                (
                    "ratio/{sign}_p{percent}",
                    "gate/{sign}_p{percent}",
                    "grad_weight/{sign}_p{percent}",
                ),
                "quantiles of r, f'(r) and r f'(r) of the tokens of an RL step, to within a bin "
                "of the histogram of log r (12 % of it)",
                "as the means above",
                "as the means above",
            ),
            Entry(
                (
                    "a1/abs_log_ratio_mean/update_{update}",
                    "a2/variance_mean/update_{update}",
                ),
                "mean abs log r and mean Var_i in one of the updates of an RL step: how the "
                "policy drifts from the one that sampled",
                "0 in update 0, up to rounding; then grows slowly",
                _SMALLER_STEPS,
            ),
        ),
    ),
)


# ---------------------------------------------------------------- look-up


def lookup(name: str) -> Entry:
    """The entry that explains a metric, e.g. `gate/pos_mean`.

    Raises UserError for a name that no entry has, with the nearest one that is known.
    """
    entries = list(_entries())
    # Names without a placeholder first: `accuracy/mean` is not of a task called "mean".
    for entry in entries:
        if name in entry.names:
            return entry
    for entry in entries:
        if entry.is_of(name):
            return entry
    raise UserError(
        f"no metric is called {name!r}{did_you_mean(name, _examples())}; `sapo-jax metrics` lists "
        "all of them"
    )


def _entries() -> Iterator[Entry]:
    for section in GLOSSARY:
        yield from section.entries


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """What matches the names that a pattern with placeholders stands for."""
    regex = ""
    for part in re.split(r"(\{\w+\})", pattern):
        if part.startswith("{"):
            regex += PLACEHOLDERS[part.strip("{}")].regex
        else:
            regex += re.escape(part)
    return re.compile(regex)


def _examples() -> list[str]:
    """All names of the glossary, with examples in the place of placeholders."""
    names: list[str] = []
    for entry in _entries():
        for pattern in entry.names:
            names += _filled_in(pattern)
    return names


def _filled_in(pattern: str) -> list[str]:
    """The names that a pattern becomes with the examples of its first placeholder, and so on."""
    placeholder = re.search(r"\{(\w+)\}", pattern)
    if placeholder is None:
        return [pattern]
    names: list[str] = []
    for example in PLACEHOLDERS[placeholder[1]].examples:
        names += _filled_in(pattern.replace(placeholder[0], example))
    return names


# ---------------------------------------------------------------- for the terminal


def describe_metric(name: str | None = None) -> str:
    """What `sapo-jax metrics [NAME]` prints.

    None: a list of all metrics. A name: meaning, healthy values, and what to do. The part of a name
    before the slash, such as `gate`: the same for all metrics that begin with it. Raises UserError
    for an unknown name.
    """
    if name is None:
        return _overview()
    prefix = name.rstrip("/") + "/"
    family = [
        entry for entry in _entries() if any(pattern.startswith(prefix) for pattern in entry.names)
    ]
    if family and name not in _examples():
        return "\n\n".join(_described(", ".join(entry.names), entry) for entry in family)
    return _described(name, lookup(name))


def _described(title: str, entry: Entry) -> str:
    lines = _wrapped(title, "", "")
    lines += _wrapped(_plain(entry.meaning), "  what it is  ", " " * 14)
    if entry.healthy:
        lines += _wrapped(_plain(entry.healthy), "  healthy     ", " " * 14)
    if entry.otherwise:
        lines += _wrapped(_plain(entry.otherwise), "  if not      ", " " * 14)
    return "\n".join(lines)


def _overview() -> str:
    lines: list[str] = []
    for section in GLOSSARY:
        lines.append(_plain(section.title))
        for entry in section.entries:
            lines += _wrapped(", ".join(entry.names), "  ", "  ")
            lines += _wrapped(_plain(entry.meaning), "      ", "      ")
        lines.append("")
    for name, placeholder in PLACEHOLDERS.items():
        lines += _wrapped(f"{{{name}}} is {_plain(placeholder.meaning)}", "", "  ")
    lines.append("")
    lines.append("sapo-jax metrics NAME says which values are healthy, and what to do if not.")
    return "\n".join(lines)


def _wrapped(text: str, first_indent: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(text: str) -> str:
    """Text without the marks of code."""
    return text.replace("`", "")


# ---------------------------------------------------------------- for README.md


def markdown() -> str:
    """The glossary as tables, one for each section, and the meaning of the placeholders."""
    lines = ["In the names,"]
    for name, placeholder in PLACEHOLDERS.items():
        lines.append(f"- `{{{name}}}` is {placeholder.meaning}")
    for section in GLOSSARY:
        lines += ["", f"### {section.title}", ""]
        lines += ["| metric | what it is | healthy | if not |", "|---|---|---|---|"]
        for entry in section.entries:
            names = ", ".join(f"`{name}`" for name in entry.names)
            lines.append(f"| {names} | {entry.meaning} | {entry.healthy} | {entry.otherwise} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str) -> str:
    """The text of the page with its table made anew; everything else stays.

    Raises ValueError if the page does not hold the two lines that mark the place of the table.
    """
    before, _, rest = page.partition(TABLE_BEGINS)
    _, end, after = rest.partition(TABLE_ENDS)
    if not end:
        raise ValueError(f"{PAGE} must hold the lines {TABLE_BEGINS!r} and {TABLE_ENDS!r}")
    return f"{before}{TABLE_BEGINS}\n\n{markdown()}\n{TABLE_ENDS}{after}"


def write_page() -> None:
    """Makes the table in this folder's README.md anew."""
    write_atomically(PAGE, page_with_table(PAGE.read_text(encoding="utf-8")))
