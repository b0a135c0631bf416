# SPDX-License-Identifier: Apache-2.0
"""How far two next-token distributions are apart, of which only the likeliest tokens are known.

Let C be the tokens that are known of both, and let all others be one outcome with the mass that is missing, p(rest) = 1 − Σ_C p:

    KL(P ‖ Q) ≥ Σ_C p ln(p / q) + p(rest) ln(p(rest) / q(rest))

Putting outcomes together never makes a divergence larger (log sum inequality; Cover, Thomas, Elements of Information Theory, 2nd ed.,
Theorem 2.7.1), so this is a lower bound that needs nobody to guess what a token has that only one side names. It is exact where
the missing masses are 0, and says little where they are large: read them beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# What is left after summing is known to float precision only: below this, nothing is missing.
_LEAST = 1e-9


@dataclass(frozen=True)
class Divergence:
    """kl: the bound, in nats. missing, other_missing: the mass of P and of Q outside of the tokens that both name."""

    kl: float
    missing: float
    other_missing: float


def truncated_kl(log_p: Mapping[int, float], log_q: Mapping[int, float]) -> Divergence:
    """Of P ‖ Q. log_p, log_q: {token: natural logarithm of its probability} of the likeliest tokens."""
    common = log_p.keys() & log_q.keys()
    terms = [(math.exp(log_p[token]), log_p[token] - log_q[token]) for token in sorted(common)]
    rest_p = max(0.0, 1.0 - math.fsum(p for p, _ in terms))
    rest_q = max(0.0, 1.0 - math.fsum(math.exp(log_q[token]) for token in common))
    kl = math.fsum(p * ratio for p, ratio in terms)  # Σ_C p ln(p / q)
    if rest_p > _LEAST:
        kl += rest_p * math.log(rest_p / max(rest_q, _LEAST))  # p(rest) ln(p(rest) / q(rest))
    return Divergence(max(0.0, kl), rest_p, rest_q)
