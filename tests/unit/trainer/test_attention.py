"""Forest attention against its twins: the plain kernel, and transformers' own attention one path at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from upspiral.algorithm.sft import sft_credit
from upspiral.trainer.attention import forest_attention_in
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.spans import FlashCpuKernel, Kernel, PlainKernel, Span, SpanAttention, spans_of

PATHS = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8, 9], [1, 2, 5, 5], [4, 4]]


def forest() -> ForestBatch:
    """A tree of three levels and a lone path; the last token of each path is the only target."""
    graphs = [demonstration_graph(str(i), [(path, [10 + i])]) for i, path in enumerate(PATHS)]
    [batch] = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=100)
    return batch


def test_spans_cover_each_query_and_its_path() -> None:
    batch = forest()
    seen = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.int64)
    for span in spans_of(batch):
        block = torch.ones(span.query_end - span.query_start, span.key_end - span.key_start, dtype=torch.int64)
        seen[span.query_start : span.query_end, span.key_start : span.key_end] += block.tril() if span.causal else block
    assert seen.max() == 1
    assert seen.sum(1).tolist() == (batch.positions_T + 1).tolist()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_fast_kernel_equals_plain_kernel(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    spans, length = spans_of(forest()), forest().num_tokens
    inputs = [torch.randn(1, heads, length, 8, dtype=dtype) for heads in (6, 2, 2, 6)]

    def run(kernel: Kernel) -> list[torch.Tensor]:
        query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
        output = SpanAttention.apply(query, key, value, spans, (), 0.3, kernel)
        assert isinstance(output, torch.Tensor)
        output.backward(inputs[3])
        return [output.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]

    for ours, theirs in zip(run(FlashCpuKernel()), run(PlainKernel()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_forest_equals_transformers_attention_path_by_path() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    batch = forest()
    with forest_attention_in(model):
        ours, entropy = target_logprobs(model, batch, temperature=0.5)
    for index, rollout in enumerate(batch.rollout_M.tolist()):
        logits = model(torch.tensor([PATHS[rollout]])).logits[0, -1] / 0.5
        wanted = logits.log_softmax(-1)
        assert ours[index].item() == pytest.approx(wanted[10 + rollout].item(), abs=1e-5)
        assert entropy[index].item() == pytest.approx(-(wanted.exp() * wanted).sum().item(), abs=1e-5)


def test_a_forward_without_spans_says_what_is_missing() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    with forest_attention_in(model), pytest.raises(ValueError, match=r"forest=ForestPass\(batch\)"):
        model(torch.tensor([[1, 2]]))
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)


def test_spans_of_a_single_node() -> None:
    graph = demonstration_graph("a", [([1, 2, 3], [4])])
    [batch] = pack([(graph, sft_credit([graph])[0])], tokens_per_microbatch=10)
    assert spans_of(batch) == (Span(0, 3, 0, 3, True),)
