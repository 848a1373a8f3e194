"""What a module's log-probabilities are, by which an engine shows that it has the module's weights."""

from __future__ import annotations

from typing import Any

import torch

from upspiral.weights.publication import Probe

_TOKENS = 32


@torch.no_grad()
def measured_probe(module: Any) -> Probe:
    """By one forward pass of a causal language model over fixed tokens, drawn from its vocabulary. Ranks that share a
    model call it together."""
    random = torch.Generator().manual_seed(0)
    token_ids = torch.randint(module.config.vocab_size, (_TOKENS,), generator=random)
    logits = module(input_ids=token_ids[None].to(module.device)).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).gather(1, token_ids[1:, None].to(logits.device))[:, 0]
    return Probe(token_ids.tolist(), logprobs.tolist())
