"""Log-probabilities of targets without ever holding logits of all of them.

Shapes: T tokens, M targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upspiral.trainer.attention import ForestPass
from upspiral.trainer.decoder import hidden_states
from upspiral.trainer.forest import ForestBatch
from upspiral.weights.exact import at_least_some_rows

LOGITS_PER_CHUNK = 1 << 25
"""Elements of the largest block of logits: 128 MB in float32."""


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

    Logits live for one chunk of rows at a time and are computed again in the backward pass: one more matrix product
    instead of M x V numbers. Softmax in float32 (float64 for double input). The entropies carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight, targets, temperature = inputs
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, entropy, lse = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(3))
        for rows in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[rows], weight, temperature, wide)
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
        grad_hidden = torch.empty_like(hidden)
        chunks = _chunks(len(targets), len(weight))
        # Several chunks are added up in full precision; a single one is rounded once, as it would be at the end.
        wide = lse.dtype if len(chunks) > 1 else weight.dtype
        grad_weight: Tensor | None = None
        trained = ctx.needs_input_grad[1]  # a model with an adapter keeps its output layer
        for rows in chunks:
            # d logprob / d logit = onehot(target) - softmax
            scaled = grads[0][rows] / ctx.temperature
            slope = _logits(hidden[rows], weight, ctx.temperature, lse.dtype).sub_(lse[rows, None]).exp_()
            slope.mul_(-scaled[:, None])
            slope.scatter_add_(1, targets[rows, None], scaled[:, None])
            slope = slope.to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            if trained:
                part = (slope.mT @ hidden[rows]).to(wide)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if trained:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = (at_least_some_rows(hidden) @ weight.mT)[: len(hidden)].to(dtype)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
