"""Slow, obvious versions of the gates and of what holds them to a budget, from their formulas.

One gate at a time, in Python's 64 bits; gradients are central differences.
"""

from __future__ import annotations

import math


def sigmoid(x):
    if x < 0:
        return math.exp(x) / (1 + math.exp(x)) if x > -700 else 0.0
    return 1 / (1 + math.exp(-x)) if x < 700 else 1.0


def clip(x, low=0.0, high=1.0):
    return min(max(x, low), high)


def difference(function, x, step=1e-5):
    """The derivative of a function of one number."""
    return (function(x + step) - function(x - step)) / (2 * step)


def gradient(function, xs, step=1e-5):
    """The derivatives of a function of a list of numbers, by each of them."""
    return [
        difference(lambda x, i=i: function([*xs[:i], x, *xs[i + 1 :]]), xs[i], step)
        for i in range(len(xs))
    ]


def concrete(log_alpha, u, beta=2 / 3):
    """Louizos et al. 2018, arXiv:1712.01312: sg((ln u - ln(1 - u) + LA) / beta)."""
    u = clip(u, 1e-6, 1 - 1e-6)
    return sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / beta)


def sample(log_alpha, u, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """clip(s * (zeta - gamma) + gamma, 0, 1)."""
    return clip(concrete(log_alpha, u, beta) * (zeta - gamma) + gamma)


def open_probability(log_alpha, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """P(z > 0) = sg(LA - beta * ln(-gamma / zeta))."""
    return sigmoid(log_alpha - beta * math.log(-gamma / zeta))


def louizos_gate(log_alpha, gamma=-0.1, zeta=1.1):
    """At test time: clip(sg(LA) * (zeta - gamma) + gamma, 0, 1), without beta."""
    return clip(sigmoid(log_alpha) * (zeta - gamma) + gamma)


def counted_gates(log_alphas, beta=2 / 3, gamma=-0.1, zeta=1.1, sharpness=0.8):
    """CoFi at test time: the round(size - sum P) smallest are 0, the rest sg(.8 * LA / beta)."""
    expected = sum(open_probability(a, beta, gamma, zeta) for a in log_alphas)
    order = sorted(range(len(log_alphas)), key=lambda i: log_alphas[i])  # stable
    gates = [sigmoid(a / beta * sharpness) for a in log_alphas]
    for i in order[: round(len(log_alphas) - expected)]:
        gates[i] = 0.0
    return gates


def penalty(over, first, second, absolute=False):
    """lam1 * d + lam2 * d^2, summed over constraints; lam1 * |d| where absolute."""
    return sum(
        a * (abs(d) if absolute else d) + b * d * d
        for d, a, b in zip(over, first, second, strict=True)
    )


def slope(over, first, second, absolute=False):
    """What the penalty gains by each difference."""
    return gradient(lambda d: penalty(d, first, second, absolute), over)


def ascend(over, first, second, lr, absolute=False):
    """Multipliers after a step of lr up the gradient of the penalty."""
    up = gradient(lambda m: penalty(over, m, second, absolute), first)
    up_second = gradient(lambda m: penalty(over, first, m, absolute), second)
    return (
        [m + lr * g for m, g in zip(first, up, strict=True)],
        [m + lr * g for m, g in zip(second, up_second, strict=True)],
    )


def soft_topk(scores, budget, temperature, costs=None):
    """sg((s_i - tau) / temperature), with the tau at which cost_i * m_i add up to the budget."""
    costs = costs or [1.0] * len(scores)

    def gates(tau):
        return [sigmoid((s - tau) / temperature) for s in scores]

    low, high = min(scores) - 800 * temperature, max(scores) + 800 * temperature
    for _ in range(2000):
        tau = (low + high) / 2
        if tau in (low, high):
            break
        if math.fsum(c * m for c, m in zip(costs, gates(tau), strict=True)) > budget:
            low = tau
        else:
            high = tau
    return gates((low + high) / 2)


def hard_topk(scores, budget, costs=None):
    """1 for the highest scores as long as they fit; of equal ones the last come first."""
    costs = costs or [1] * len(scores)
    gates, spent = [0.0] * len(scores), 0.0
    for i in sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True):
        spent += costs[i]
        if spent > budget + 1e-9:
            break
        gates[i] = 1.0
    return gates


def gumbel_sigmoid(logit, u, temperature=0.4, base=3.0):
    """sg((logit + g + base) / T), g = -ln(-ln u)."""
    u = clip(u, 1e-6, 1 - 1e-6)
    return sigmoid((logit - math.log(-math.log(u)) + base) / temperature)


def ratio_loss(x, y):
    """R(x, y) = ln(max(x, y) / min(x, y))."""
    return math.log(max(x, y) / min(x, y))
