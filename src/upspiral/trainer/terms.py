"""What a batch says about its trained tokens, as tensors for the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from upspiral.algorithm.loss import TokenTerms
from upspiral.trainer.forest import ForestBatch


def token_terms(batch: ForestBatch, logprobs: Tensor, old_logprobs: Tensor | None) -> TokenTerms:
    behavior, positive, negative, weight = (
        torch.from_numpy(array).to(logprobs)
        for array in (batch.behavior_logprobs_M, batch.positive_M, batch.negative_M, batch.token_weight_M)
    )
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    return TokenTerms(logprobs, old, behavior, positive, negative, weight)
