"""Log-probabilities of targets without ever holding logits of all of them.

Shapes: T tokens, M targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upspiral.kernel.product import multiply
from upspiral.trainer.attention import ForestPass
from upspiral.trainer.decoder import hidden_states
from upspiral.trainer.forest import ForestBatch
from upspiral.weights.exact import at_least_some_rows

LOGITS_PER_BLOCK = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Elements of the largest block of logits, by the kind of device: 32 and 128 MB in float32. On a CPU, smaller ones stay
longer in the caches (measured: 1.3 s instead of 1.7 s for 2,048 targets), on a GPU larger ones cost fewer launches."""


def target_logprobs(
    model: Any, batch: ForestBatch, *, temperature: float, forest: ForestPass | None = None
) -> tuple[Tensor, Tensor]:
    """(log p_theta of the batch's targets with gradient, entropy of the distributions they come from), both [M], at
    least float32, natural log, after division of the logits by `temperature`. `forest`: the batch's pass, for one that
    has a context or is one.

    `model` is a causal language model of transformers inside `forest_attention_in`, or any module with `get_decoder()`
    and `get_output_embeddings()` whose decoder takes the keyword `forest`.
    """
    head = model.get_output_embeddings().weight
    token_ids, positions, sources, targets = (
        torch.from_numpy(array).to(head.device)
        for array in (batch.token_ids_T, batch.positions_T, batch.sources_M, batch.targets_M)
    )
    forest = forest or ForestPass(batch)
    if forest.exact:
        token_ids, positions = at_least_some_rows(token_ids), at_least_some_rows(positions)
    hidden_TD = hidden_states(model, token_ids, positions, forest)
    logprobs, entropy = ChunkedLogprob.apply(hidden_TD.index_select(0, sources), head, targets, temperature)  # type: ignore[misc]
    return logprobs, entropy


class ChunkedLogprob(torch.autograd.Function):
    """apply(hidden [M,D], weight [V,D], targets [M], temperature) -> (log-probabilities [M], entropies [M]).

    Logits live for one block at a time and are computed again in the backward pass: one more matrix product instead of
    M x V numbers. Forward, a block is some rows, as a softmax needs them whole; backward, it is a part of the
    vocabulary, so that each row of the weight's gradient is summed in one product and rounded once. Softmax in float32
    (float64 for double input). The entropies carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, targets, temperature = inputs
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, entropy, lse = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(3))
        for rows in blocks(len(targets), len(weight), weight.device):
            logits = logits_of(hidden[rows], weight, temperature, wide)
            chosen = logits.gather(1, targets[rows, None])[:, 0]
            # As the engine does it, row by row to the same bits.
            all_logprobs = logits.log_softmax(1)
            logprobs[rows] = all_logprobs.gather(1, targets[rows, None])[:, 0]
            lse[rows] = chosen - logprobs[rows]
            entropy[rows] = -torch.linalg.vecdot(torch.exp(all_logprobs, out=logits), all_logprobs)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, targets, lse = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]  # a model with an adapter keeps its output layer
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight) if trained else None
        scaled_M1 = (grads[0] / ctx.temperature)[:, None]
        for part in blocks(len(weight), len(targets), weight.device):
            # d logprob / d logit = onehot(target) - softmax
            slope = logits_of(hidden, weight[part], ctx.temperature, lse.dtype).sub_(lse[:, None]).exp_()
            slope.mul_(-scaled_M1)
            place_M1 = (targets - part.start)[:, None]
            inside_M1 = (place_M1 >= 0) & (place_M1 < slope.shape[1])
            slope.scatter_add_(1, place_M1.clamp(0, slope.shape[1] - 1), scaled_M1 * inside_M1)
            slope = slope.to(weight.dtype)
            grad_hidden += multiply(slope, weight[part].mT)
            if grad_weight is not None:
                grad_weight[part] = multiply(slope.mT, hidden.mT)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def logits_of(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = multiply(at_least_some_rows(hidden), weight)[: len(hidden)].to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def blocks(count: int, width: int, device: torch.device) -> list[slice]:
    """`count` in parts that make blocks of logits together with `width` of the other dimension."""
    size = max(1, LOGITS_PER_BLOCK.get(device.type, LOGITS_PER_BLOCK["cuda"]) // max(1, width))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
