"""The learner: scoring of given tokens, the jitted update, routing replay."""

from sapo_jax.learner.routing_replay import check_expert_ids, router_metrics, sampled_experts
from sapo_jax.learner.scoring import (
    HeadScores,
    ScorerOutput,
    Scores,
    head_logprobs,
    make_scorer,
    score,
)
from sapo_jax.learner.state import abstract_params, abstract_state, fresh_state, random_params
from sapo_jax.learner.update import (
    LossFn,
    UpdateFn,
    init_state,
    last_learning_rate,
    make_optimizer,
    make_rl_update,
    make_schedule,
    make_update,
    policy_loss,
    sft_loss,
    state_shardings,
)

__all__ = [
    "HeadScores",
    "LossFn",
    "ScorerOutput",
    "Scores",
    "UpdateFn",
    "abstract_params",
    "abstract_state",
    "check_expert_ids",
    "fresh_state",
    "head_logprobs",
    "init_state",
    "last_learning_rate",
    "make_optimizer",
    "make_rl_update",
    "make_schedule",
    "make_scorer",
    "make_update",
    "policy_loss",
    "random_params",
    "router_metrics",
    "sampled_experts",
    "score",
    "sft_loss",
    "state_shardings",
]
