"""The trainer takes steps with every family, lanes and exact mode included."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.forest import pack
from upspiral.trainer.local import LocalTrainer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_demonstrations_are_learned_by_all_weights_and_the_same_way_each_time(family: str, exact: bool) -> None:
    graphs = [demonstration_graph(str(i), [([1, 2, 3 + i], [9, 8, 7, i] * 15)]) for i in range(12)]
    batches = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=150, lanes=2)

    def train() -> tuple[list[float], list[torch.Tensor]]:
        module = tiny_module(family)
        trainer = LocalTrainer(module, TrainerConfig(lr=1e-2), AlgorithmConfig(), temperature=1.0, lanes=2, exact=exact)
        losses = [trainer.step(batches, kind="sft").loss for _ in range(6)]
        return losses, [parameter.detach() for parameter in module.parameters()]

    losses, weights = train()
    assert losses[-1] < losses[0] / 2
    for before, after in zip(tiny_module(family).parameters(), weights, strict=True):
        assert not torch.equal(before, after)
    again, others = train()
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
