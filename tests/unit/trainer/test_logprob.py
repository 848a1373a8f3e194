"""Log-probabilities in blocks against log_softmax over all logits."""

from __future__ import annotations

import pytest
import torch

from upspiral.trainer import logprob
from upspiral.trainer.logprob import ChunkedLogprob


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, rows_per_block: int, temperature: float) -> None:
    monkeypatch.setitem(logprob.LOGITS_PER_BLOCK, "cpu", 50 * rows_per_block)
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    targets, slope = torch.randint(50, (10,)), torch.randn(10, dtype=torch.float64)

    logprobs, entropy = ChunkedLogprob.apply(hidden, weight, targets, temperature)  # type: ignore[misc]
    (logprobs * slope).sum().backward()
    ours = [logprobs.detach(), entropy, hidden.grad, weight.grad]

    hidden.grad = weight.grad = None
    everything = (hidden @ weight.mT / temperature).log_softmax(-1)
    chosen = everything[torch.arange(10), targets]
    (chosen * slope).sum().backward()
    theirs = [chosen.detach(), -(everything.exp() * everything).sum(1).detach(), hidden.grad, weight.grad]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 32).bfloat16(), torch.randn(4000, 32).bfloat16()
    targets = torch.randint(4000, (5,))
    logprobs, _ = ChunkedLogprob.apply(hidden, weight, targets, 1.0)  # type: ignore[misc]
    wanted = (hidden @ weight.mT).float().log_softmax(-1)[torch.arange(5), targets]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, wanted, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_weight_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).bfloat16()
    weight = torch.randn(512, 32).bfloat16().requires_grad_()
    targets = torch.randint(512, (64,))

    def gradient(block: int) -> torch.Tensor:
        monkeypatch.setitem(logprob.LOGITS_PER_BLOCK, "cpu", block)
        logprobs, _ = ChunkedLogprob.apply(hidden, weight, targets, 1.0)  # type: ignore[misc]
        (found,) = torch.autograd.grad(logprobs.sum(), weight)
        return found

    torch.testing.assert_close(gradient(8 * 512), gradient(64 * 512), rtol=2**-8, atol=1e-7)
