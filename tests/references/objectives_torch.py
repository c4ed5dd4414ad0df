"""The objectives in plain torch, written from the papers' formulas: no masks, no padding, one loop per sum sign.

A batch is a list of sequences: logp[i] and old_logp[i] are 1-D tensors of token log-probabilities, adv[i]
is a number. Every function returns J, the objective to be maximised, as the paper prints it. Independent of sapo_jax.
"""

from __future__ import annotations

import torch


def mean_over_sequences_of_token_means(terms):
    """1/G sum_i 1/|y_i| sum_t terms[i][t]"""
    total = 0.0
    for term in terms:
        total = total + sum(term) / len(term)
    return total / len(terms)


def mean_over_tokens(terms):
    """1/(sum_i |y_i|) sum_i sum_t terms[i][t] (DAPO, Eq. 8)"""
    total, count = 0.0, 0
    for term in terms:
        total, count = total + sum(term), count + len(term)
    return total / count


def constant_length(terms, max_new_tokens):
    """1/G sum_i 1/L_max sum_t terms[i][t] (Dr. GRPO)"""
    return sum(sum(term) for term in terms) / (len(terms) * max_new_tokens)


def sapo_terms(logp, old_logp, adv, tau_pos, tau_neg):
    """f_{i,t}(r) A_i with f(x) = sigma(tau (x - 1)) 4/tau (SAPO, Eqs. 5, 6)."""
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        tau = tau_pos if a > 0 else tau_neg
        terms.append(
            [
                torch.sigmoid(tau * (torch.exp(p - q) - 1)) * 4 / tau * a
                for p, q in zip(logp_T, old_T)
            ]
        )
    return terms


def ppo_clip(r, a, clip_low, clip_high):
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, Eq. 7), spelled out for numbers."""
    unclipped = r * a
    clipped = torch.clamp(r, 1 - clip_low, 1 + clip_high) * a
    return unclipped if unclipped.item() <= clipped.item() else clipped


def grpo_terms(logp, old_logp, adv, clip_low, clip_high):
    """GRPO, Eq. 3, without its KL term."""
    return [
        [ppo_clip(torch.exp(p - q), a, clip_low, clip_high) for p, q in zip(logp_T, old_T)]
        for logp_T, old_T, a in zip(logp, old_logp, adv)
    ]


def gspo(logp, old_logp, adv, clip_low, clip_high):
    """J = 1/G sum_i min(s_i A_i, clip(s_i) A_i), s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|) (GSPO, Eqs. 5, 7)."""
    total = 0.0
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        s = torch.exp((logp_T.sum() - old_T.sum()) / len(logp_T))
        total = total + ppo_clip(s, a, clip_low, clip_high)
    return total / len(logp)


def gspo_token_terms(logp, old_logp, adv, clip_low, clip_high):
    """The terms of GSPO-token, s_{i,t} = sg[s_i] pi_t / sg[pi_t] (GSPO, Eqs. 13, 14)."""
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        s = torch.exp((logp_T - old_T).mean()).detach()
        terms.append(
            [ppo_clip(s * p.exp() / p.exp().detach(), a, clip_low, clip_high) for p in logp_T]
        )
    return terms


def cispo_terms(logp, old_logp, adv, clip_low, clip_high):
    """sg(clip(r)) A log pi (MiniMax-M1, Eqs. 4, 5): the value uses log pi itself."""
    return [
        [
            torch.clamp(torch.exp(p - q), 1 - clip_low, 1 + clip_high).detach() * a * p
            for p, q in zip(logp_T, old_T)
        ]
        for logp_T, old_T, a in zip(logp, old_logp, adv)
    ]
