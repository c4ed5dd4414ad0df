"""The statistics of `sapo_jax.diagnostics.evidence` from their formulas: loops over sequences, torch float64."""

from __future__ import annotations

import torch

SUP = 0.5  # sup |g''| / tau^2


def of_sequence(z: torch.Tensor, tau: float) -> dict[str, float]:
    """z [n], float64: the log-ratios of one sequence."""
    mu = z.mean()
    variance = ((z - mu) ** 2).mean()

    def g(x: torch.Tensor) -> torch.Tensor:
        return 1 / torch.cosh(tau / 2 * x) ** 2

    def f_prime(x: torch.Tensor) -> torch.Tensor:
        return 1 / torch.cosh((tau / 2 * (x.exp() - 1)).clamp(-300, 300)) ** 2

    return {
        "mean": mu.item(),
        "variance": variance.item(),
        "gap_log": (g(z).mean() - g(mu)).abs().item(),
        "gap_real": (f_prime(z).mean() - f_prime(mu)).abs().item(),
        "bound": (SUP * tau**2 / 2 * variance).item(),
    }


def of_rows(log_ratio_BT, adv_BT, mask_BT, ids_BT, gates) -> list[dict]:
    """One dict per sequence that has trained tokens, in order: the above, its length, advantage, row and id."""
    found = []
    for b in range(len(mask_BT)):
        for i in sorted(set(ids_BT[b][mask_BT[b]].tolist())):
            mine = mask_BT[b] & (ids_BT[b] == i)
            adv = float(adv_BT[b][mine][0])
            z = torch.tensor(log_ratio_BT[b][mine].astype("float64")).clamp(-20, 20)
            tau = gates.tau_pos if adv > 0 else gates.tau_neg
            found.append(
                of_sequence(z, tau)
                | {"length": int(mine.sum()), "adv": adv, "row": b, "id": i, "tau": tau}
            )
    return found
