"""The objectives in plain torch, written from the papers' formulas: no masks, no padding, one loop per sum sign.

A batch is a list of sequences: logp[i] and old_logp[i] are 1-D tensors of token log-probabilities, adv[i]
is a number. Every function returns J, the objective to be maximised, as the paper prints it. Independent of sapo_jax.
"""

from __future__ import annotations

import math

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


def gate(name, log_r, tau):
    """f of a gate; log_r is a tensor of one number. SAPO, Eqs. 6 and 17; arXiv 2602.19345, Eqs. 6-8."""
    r = torch.exp(log_r)
    u = tau * (r - 1)
    if name == "ratio":
        return torch.sigmoid(u) * 4 / tau
    if name == "log":
        return 2 / tau * torch.tanh(tau / 2 * log_r)
    if name == "erf":
        return 1 + math.sqrt(math.pi / 2) / tau * torch.erf(u / math.sqrt(2))
    if name == "arctan":
        return 1 + torch.arctan(u) / tau
    if name == "softsign":
        return 1 + (r - 1) / torch.sqrt(1 + u**2)
    raise ValueError(name)


def bounded(log_r, low, high):
    """log r clamped to [log(1 - low), log(1 + high)], where None is no bound: a constant beyond."""
    if low is not None:
        log_r = torch.clamp(log_r, min=math.log(1 - low))
    if high is not None:
        log_r = torch.clamp(log_r, max=math.log(1 + high))
    return log_r


def gated_terms(logp, old_logp, adv, name, taus, bounds=None):
    """f(r) A of a gate with the temperatures taus[sign, side] and taus[sign], shifted to one f(1).

    bounds: (low, high) by sign, where "pos" is A > 0.
    """
    bounds = bounds or {}
    zero = torch.zeros((), dtype=torch.float64)
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        sign = "pos" if a > 0 else "neg"
        terms.append([])
        for p, q in zip(logp_T, old_T):
            log_r = bounded(p - q, *bounds.get(sign, (None, None)))
            side = "below" if log_r.item() < 0 else "above"
            tau = taus.get((sign, side), taus[sign])
            shift = gate(name, zero, taus[sign]) - gate(name, zero, tau)
            terms[-1].append((gate(name, log_r, tau) + shift) * a)
    return terms


def bounded_terms(logp, old_logp, adv, terms_of, bounds):
    """terms_of a token objective, on log-ratios that are held at the bounds of the sign of A."""
    held = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        low_high = bounds.get("pos" if a > 0 else "neg", (None, None))
        held.append([q + bounded(p - q, *low_high) for p, q in zip(logp_T, old_T)])
    return terms_of(held, old_logp, adv)


def vespo_terms(logp, old_logp, adv, pos=(2.0, 3.0), neg=(3.0, 2.0)):
    """sg[W^c1 exp(c2 (1 - W))] A log r, W = prod_t r (VESPO, Eqs. 5, 17)."""
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        c1, c2 = pos if a >= 0 else neg
        W = torch.exp((logp_T - old_T).sum())
        weight = (W**c1 * torch.exp(c2 * (1 - W))).detach()
        terms.append([weight * a * (p - q) for p, q in zip(logp_T, old_T)])
    return terms


def dppo_terms(logp, old_logp, adv, divergence, delta, cap=math.inf):
    """sg[M min(r, C)] A log r (DPPO, Eqs. 12-16): the binary divergences."""
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        terms.append([])
        for p, q in zip(logp_T, old_T):
            pi, mu = p.exp().item(), q.exp().item()
            if divergence == "tv":
                distance = abs(mu - pi)
            else:
                distance = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
            moves_away = (a > 0 and pi > mu) or (a < 0 and pi < mu)
            weight = 0.0 if moves_away and distance > delta else min(pi / mu, cap)
            terms[-1].append(weight * a * (p - q))
    return terms


def topr_terms(logp, old_logp, adv):
    """A log r where A > 0, sg[min(W, 1)] A log r where A < 0 (TOPR, Eqs. 7, 8)."""
    terms = []
    for logp_T, old_T, a in zip(logp, old_logp, adv):
        W = torch.exp((logp_T - old_T).sum()).item()
        weight = 1.0 if a > 0 else min(W, 1.0)
        terms.append([weight * a * (p - q) for p, q in zip(logp_T, old_T)])
    return terms


def mask_sequences(terms, logp, sampler_logp, adv, below):
    """M_i times the terms, M_i = 0 if A_i < 0 and mean_t log(pi_sampler / pi) > below (DeepSeek-V3.2, Eq. 9)."""
    kept = []
    for terms_T, logp_T, sampler_T, a in zip(terms, logp, sampler_logp, adv):
        drift = sum((s - p).item() for p, s in zip(logp_T, sampler_T)) / len(terms_T)
        M = 0.0 if a < 0 and drift > below else 1.0
        kept.append([M * term for term in terms_T])
    return kept
