"""Draws tokens from logits, one uniform number a token: a sequence's draws depend on nothing but its own generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upspiral.types import SamplingParams

_BLOCK = 128


def sample(
    logits_SV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float], list[NDArray[np.int32] | None]]:
    """Token ids, their log-probabilities and, where `list_kept` asks for them, the ids that the filters left; one for
    each of S rows over V tokens. `uniforms` lie in [0, 1).

    The log-probability is that of the distribution drawn from: after temperature, then min-p, then top-k, then top-p.
    Temperature 0 takes the likeliest token, with its log-probability under the plain softmax. NaN gives NaN.
    """
    logits_SV = logits_SV.float()
    temperatures = [each.temperature or 1.0 for each in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits_SV = logits_SV / torch.tensor(temperatures, device=logits_SV.device)[:, None]
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    probabilities_SV = logprobs_SV.exp()
    kept: list[NDArray[np.int32] | None] = [None] * len(params)
    filtered = [row for row, each in enumerate(params) if _filters(each, logits_SV.shape[1])]
    for row in filtered:
        probabilities_SV[row] = _filter(torch.softmax(logits_SV[row], dim=-1), params[row])
        logprobs_SV[row] = probabilities_SV[row].log()
        if params[row].list_kept:
            kept[row] = probabilities_SV[row].nonzero()[:, 0].to(torch.int32).numpy(force=True)
    uniforms_S = torch.tensor(list(uniforms), dtype=torch.float64, device=logits_SV.device)
    tokens_S = _invert_cdf(probabilities_SV, uniforms_S)
    greedy = [row for row, each in enumerate(params) if each.temperature == 0]
    if greedy:
        tokens_S[greedy] = logits_SV[greedy].argmax(dim=-1)
    return tokens_S.tolist(), logprobs_SV.gather(1, tokens_S[:, None])[:, 0].tolist(), kept


def _filters(params: SamplingParams, vocabulary: int) -> bool:
    return params.temperature > 0 and (0 < params.top_k < vocabulary or params.top_p < 1 or params.min_p > 0)


def _filter(probabilities_V: Tensor, params: SamplingParams) -> Tensor:
    """Keeps what min_p leaves, of these the top_k likeliest, of these the fewest that hold top_p of the mass, and
    renormalises."""
    ordered, order = probabilities_V.sort(descending=True)
    if params.min_p > 0:
        ordered[ordered < params.min_p * ordered[0]] = 0
        ordered /= ordered.sum()
    if params.top_k > 0:
        ordered[params.top_k :] = 0
        ordered /= ordered.sum()
    if params.top_p < 1:
        mass_before = ordered.cumsum(0) - ordered
        mass_before[0] = -1.0  # the likeliest token always stays
        ordered[mass_before >= params.top_p] = 0
    return torch.zeros_like(probabilities_V).scatter_(0, order, ordered / ordered.sum())


def _invert_cdf(probabilities_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds the uniform.

    Cumulating block sums first and then inside one block costs a quarter of cumulating the vocabulary, and rounds less.
    Both levels clamp to their own total, so rounding never picks a token of probability zero.
    """
    rows, size = probabilities_SV.shape
    if size % _BLOCK:
        probabilities_SV = torch.nn.functional.pad(probabilities_SV, (0, _BLOCK - size % _BLOCK))
    blocks_SKB = probabilities_SV.view(rows, -1, _BLOCK)
    cumulated_SK = blocks_SKB.sum(-1).double().cumsum(-1)
    thresholds_S1 = uniforms_S[:, None] * cumulated_SK[:, -1:]
    block_S1 = _first_above(cumulated_SK, thresholds_S1)
    before_S1 = torch.where(block_S1 > 0, cumulated_SK.gather(1, (block_S1 - 1).clamp(min=0)), 0.0)
    inside_SB = blocks_SKB[torch.arange(rows, device=block_S1.device), block_S1[:, 0]].double().cumsum(-1)
    token_S1 = block_S1 * _BLOCK + _first_above(inside_SB, thresholds_S1 - before_S1)
    return token_S1[:, 0].clamp(max=size - 1)  # only a NaN gets here past the end


def _first_above(cumulated_SN: Tensor, thresholds_S1: Tensor) -> Tensor:
    """Index of the first entry above the threshold, which is brought below the last entry where it is not."""
    total_S1 = cumulated_SN[:, -1:]
    below_total_S1 = torch.minimum(thresholds_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    found_S1 = torch.searchsorted(cumulated_SN, below_total_S1, right=True)
    return found_S1.clamp(max=cumulated_SN.shape[1] - 1)
