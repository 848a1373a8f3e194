"""What a module's log-probabilities are, by which an engine shows that it has the module's weights."""

from __future__ import annotations

from typing import Any

import torch

from upspiral.weights.publication import Probe

_TOKENS = 32


def probe_tokens(vocabulary: int) -> list[int]:
    """Fixed tokens drawn from a vocabulary of that size."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_TOKENS,), generator=random).tolist()


@torch.no_grad()
def measured_probe(module: Any) -> Probe:
    """By one forward pass of a causal language model."""
    token_ids = probe_tokens(module.config.vocab_size)
    given = torch.tensor(token_ids, device=module.device)
    logits = module(input_ids=given[None]).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1).gather(1, given[1:, None])[:, 0]
    return Probe(token_ids, logprobs.tolist())
