"""FlexAttention over the forest's block mask against the spans. On a CPU torch has no backward pass of it: gradients
are for tests/gpu/test_forest_flex.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from tests.fixtures.demonstrations import demonstration_graph
from upspiral.algorithm.sft import sft_credit
from upspiral.trainer.flex import BLOCK, attend_by_blocks, block_mask_of, flex_attention_takes
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.spans import PlainKernel, attend_by_spans, spans_of

SCALE = 0.3


def batches(lengths: tuple[int, int, int], budget: int) -> list[ForestBatch]:
    """A beginning that all share, one that two share, and their ends; cut after `budget` tokens."""
    system, question, answer = (list(range(10 * n, 10 * n + length)) for n, length in enumerate(lengths))
    shown = [(system, [1]), (system + question, [2]), (system + question + answer, answer), (answer, [4, 5, 6])]
    graphs = [demonstration_graph(str(number), [turn]) for number, turn in enumerate(shown)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=budget)


def inputs_for(batch: ForestBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys = batch.context_length + batch.num_tokens
    return (
        torch.randn(1, 6, batch.num_tokens, 16, dtype=dtype),
        torch.randn(1, 2, keys, 16, dtype=dtype),
        torch.randn(1, 2, keys, 16, dtype=dtype),
    )


def by_spans(batch: ForestBatch, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return attend_by_spans(*inputs, spans_of(batch), SCALE, PlainKernel())[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("lengths", "budget"), [((5, 4, 3), 100), ((5, 4, 3), 6), ((150, 130, 90), 1000), ((150, 300, 129), 200)]
)
def test_uncompiled_flex_attention_equals_the_spans(lengths: tuple[int, int, int], budget: int) -> None:
    torch.compiler.reset()
    made = batches(lengths, budget)
    assert (budget < sum(lengths)) == any(batch.context_length for batch in made)
    for batch in made:
        inputs = inputs_for(batch, torch.float64)
        ours = flex_attention(*inputs, block_mask=block_mask_of(batch, "cpu"), scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(ours, by_spans(batch, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_attention_equals_the_spans_and_is_compiled_for_few_shapes() -> None:
    torch.compiler.reset()
    counters.clear()
    for lengths, budget in (((5, 4, 3), 100), ((150, 300, 129), 200), ((200, 130, 90), 1000), ((700, 2, 300), 400)):
        for batch in batches(lengths, budget):
            inputs = inputs_for(batch, torch.float32)
            ours = attend_by_blocks(*inputs, block_mask_of(batch, "cpu"), SCALE)
            torch.testing.assert_close(ours, by_spans(batch, inputs), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 4


def test_of_32k_tokens_in_a_row_only_the_blocks_on_the_diagonal_are_looked_into() -> None:
    count = 256
    graph = demonstration_graph("long", [(list(range(BLOCK)) * count, [1])])
    [batch] = pack([(graph, sft_credit([graph])[0])], tokens_per_microbatch=count * BLOCK)
    mask = block_mask_of(batch, "cpu")
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.tolist() == [[list(range(count))]]
    assert mask.kv_num_blocks.tolist() == [[[1] * count]]
    assert sum(x.nbytes for x in mask.as_tuple() if isinstance(x, Tensor)) < 2_000_000


@pytest.mark.parametrize(
    ("device", "dtype", "width", "taken"),
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float32, 16, True),
        ("cuda", torch.float64, 64, False),
        ("cuda", torch.float32, 8, False),
        ("cpu", torch.float32, 64, False),
    ],
)
def test_heads_on_a_gpu_are_taken_unless_wide_numbers_or_narrow_heads(
    device: str, dtype: torch.dtype, width: int, taken: bool
) -> None:
    with FakeTensorMode():
        query = torch.empty(1, 4, 9, width, dtype=dtype, device=device)
    assert flex_attention_takes(query) == taken
