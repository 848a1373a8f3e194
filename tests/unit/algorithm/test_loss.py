"""The policy loss, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from upspiral.algorithm.loss import PolicyLoss, TokenTerms

LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, mismatch_cap=2.0)


def token(drift: float, mismatch: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """(loss, its gradient with respect to log p_theta, metrics) of one token with these two ratios."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    logprobs = (old + math.log(drift)).requires_grad_()
    credit = torch.tensor([advantage], dtype=torch.float64)
    terms = TokenTerms(
        logprobs, old, old - math.log(mismatch), credit.clamp(min=0), credit.clamp(max=0), torch.ones_like(old)
    )
    loss, metrics = LOSS(terms)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("drift", "advantage", "expected", "flows"),
    [
        (1.0, 1.0, -1.0, True),
        (1.5, 1.0, -1.28, False),  # already much likelier: no further push
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),  # already much rarer
        (1.5, -1.0, 1.5, True),
    ],
)
def test_clip(drift: float, advantage: float, expected: float, flows: bool) -> None:
    loss, gradient, metrics = token(drift, 1.0, advantage)
    assert loss == pytest.approx(expected)
    assert gradient == pytest.approx(-advantage * drift if flows else 0.0)
    assert metrics["clip_fraction"] == (0 if flows else 1)


@pytest.mark.parametrize(("mismatch", "weight"), [(0.5, 0.5), (1.5, 1.5), (3.0, 2.0)])
def test_engine_mismatch_multiplies_and_is_truncated(mismatch: float, weight: float) -> None:
    loss, gradient, metrics = token(1.0, mismatch, 1.0)
    assert (loss, gradient) == (pytest.approx(-weight), pytest.approx(-weight))
    assert metrics["max_mismatch_abs"] == pytest.approx(abs(math.log(mismatch)))
    assert metrics["mismatch_kl"] == pytest.approx(mismatch - 1 - math.log(mismatch))
    assert metrics["mismatch_capped"] == (mismatch > 2)


def test_absurd_ratios_stay_finite() -> None:
    loss, gradient, _ = token(1e30, 1e30, -1.0)
    assert math.isfinite(loss)
    assert math.isfinite(gradient)
