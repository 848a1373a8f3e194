"""Losses over the tokens of a batch. The one file here that needs torch; only the trainer imports it.

Shapes: M is the number of trained tokens of a microbatch. Losses are sums, never means: the denominators are in
`token_weight`, fixed before the batch was packed (DESIGN law 3), so microbatches simply add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from upspiral.config.models import AlgorithmConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before `exp`, so that one absurd token cannot overflow."""


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What a loss is made of, all [M]. `logprobs` carries the gradient; everything else is constant."""

    logprobs: Tensor
    """log p_theta of the trained tokens."""
    old_logprobs: Tensor
    """log p_old: the trainer's own, before the first optimizer step on this batch."""
    behavior_logprobs: Tensor
    """log q: what the engine recorded when it sampled."""
    positive: Tensor
    """Sum of the positive advantages of the leaves below the token, at least 0."""
    negative: Tensor
    """Sum of the negative ones, at most 0."""
    token_weight: Tensor


class Loss(Protocol):
    """Sum over tokens, and sums of metrics: keys starting with "max_" are maxima, all others are to be divided by M."""

    def __call__(self, terms: TokenTerms) -> tuple[Tensor, Mapping[str, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The clipped policy gradient (PPO, arXiv 1707.06347, eq. 7) with the engine mismatch corrected apart.

        - sum_t w_t min(p_old/q, cap) (A+ min(r, clip r) + A- max(r, clip r)),   r = p_theta / p_old

    The two ratios stay apart (DESIGN law 4): p_old/q corrects for the engine being another program than the trainer,
    is truncated and carries no gradient (truncated importance sampling); r is the drift of the policy since p_old.
    """

    clip_low: float
    clip_high: float
    mismatch_cap: float

    @classmethod
    def from_config(cls, config: AlgorithmConfig) -> PolicyLoss:
        return cls(config.clip_low, config.clip_high, config.mismatch_cap)

    def __call__(self, terms: TokenTerms) -> tuple[Tensor, Mapping[str, Tensor]]:
        drift = _ratio(terms.logprobs - terms.old_logprobs)
        clipped = drift.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = terms.positive * torch.minimum(drift, clipped) + terms.negative * torch.maximum(drift, clipped)
        mismatch = _ratio(terms.old_logprobs - terms.behavior_logprobs).clamp(max=self.mismatch_cap)
        loss = -(terms.token_weight * mismatch * surrogate).sum()
        return loss, self._metrics(terms, drift.detach())

    def _metrics(self, terms: TokenTerms, drift: Tensor) -> Mapping[str, Tensor]:
        gap = terms.old_logprobs - terms.behavior_logprobs
        # The tokens whose gradient the clip cuts off, by the sign of what is left of their credit.
        cut = ((drift > 1 + self.clip_high) & (terms.positive > 0)) | (
            (drift < 1 - self.clip_low) & (terms.negative < 0)
        )
        return {
            "clip_fraction": cut.sum(),
            "drift_kl": (drift - 1 - drift.log()).sum(),
            "mismatch_abs": gap.abs().sum(),
            "max_mismatch_abs": gap.abs().max(),
            # k3, an unbiased estimate of KL(q || p_old) that is never negative: http://joschu.net/blog/kl-approx.html
            "mismatch_kl": (_ratio(gap) - 1 - gap).sum(),
            "mismatch_capped": (gap.exp() > self.mismatch_cap).sum(),
        }


@dataclass(frozen=True, slots=True)
class SftLoss:
    """Weighted negative log-likelihood."""

    def __call__(self, terms: TokenTerms) -> tuple[Tensor, Mapping[str, Tensor]]:
        return -(terms.token_weight * terms.positive * terms.logprobs).sum(), {}


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
