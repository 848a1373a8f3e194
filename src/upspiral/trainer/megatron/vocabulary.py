"""Log-probabilities of targets where each tensor-parallel rank has a part of the output layer.

Logits never leave their rank: ranks tell each other one number for each target, not a row of the vocabulary.
Shapes: M targets, W hidden width, V words of this rank, which may be none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from upspiral.kernel.product import multiply
from upspiral.trainer.logprob import blocks, logits_of


class VocabularyParallelLogprob(torch.autograd.Function):
    """apply(hidden [M,W], weight [V,W], targets [M], temperature, group, most) -> (log-probabilities, entropies), both
    [M], as `ChunkedLogprob`, the same on all ranks of the group. `hidden` is the same on all; a target is counted from
    the rank's first word, so it is below 0 or at least V where another rank has it. `most`: words of the rank that has
    most of them, so that all ranks take as many targets at a time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, targets, temperature, group, most = inputs
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, entropy, lse = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(3))
        for rows in blocks(len(targets), most, weight.device):
            logits = logits_of(hidden[rows], weight, temperature, wide)
            lse[rows] = _logsumexp_of_all(logits.logsumexp(1), group)
            expected = torch.linalg.vecdot((logits - lse[rows, None]).exp_(), logits)
            sums = torch.stack([_chosen(logits, targets[rows]), expected])
            distributed.all_reduce(sums, group=group)
            logprobs[rows] = sums[0] - lse[rows]
            entropy[rows] = lse[rows] - sums[1]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature, ctx.group = temperature, group
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight)
        scaled_M1 = (grads[0] / ctx.temperature)[:, None]
        for part in blocks(len(weight), len(targets), weight.device):
            # d logprob / d logit = onehot(target) - softmax
            slope = logits_of(hidden, weight[part], ctx.temperature, lse.dtype).sub_(lse[:, None]).exp_()
            slope.mul_(-scaled_M1)
            place_M1, inside_M1 = _places(targets - part.start, slope.shape[1])
            slope.scatter_add_(1, place_M1, scaled_M1 * inside_M1)
            slope = slope.to(weight.dtype)
            grad_hidden += multiply(slope, weight[part].mT)
            grad_weight[part] = multiply(slope.mT, hidden.mT)
        distributed.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _logsumexp_of_all(own: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(group.size())]
    distributed.all_gather(parts, own, group=group)
    return torch.stack(parts).logsumexp(0)


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits of the targets that are here; 0 for the others."""
    if not logits.shape[1]:
        return logits.new_zeros(len(logits))
    place_M1, inside_M1 = _places(targets, logits.shape[1])
    return (logits.gather(1, place_M1) * inside_M1)[:, 0]


def _places(targets: Tensor, words: int) -> tuple[Tensor, Tensor]:
    place_M1 = targets[:, None]
    return place_M1.clamp(0, words - 1), (place_M1 >= 0) & (place_M1 < words)
