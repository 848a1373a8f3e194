"""The compiled decoder beside transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.tiny_modules import tiny_module
from tests.property.forests import relative_difference
from upspiral.algorithm.sft import sft_credit
from upspiral.errors import ModelError
from upspiral.kernel.rows import rows
from upspiral.trainer.attention import ForestPass, forest_attention_in
from upspiral.trainer.decoder import CompiledDecoder, hidden_states
from upspiral.trainer.forest import ForestBatch, pack


@pytest.fixture(autouse=True)
def compiled_rows() -> None:
    if rows() is None:
        pytest.skip("nothing can be compiled here")


def forest() -> ForestBatch:
    paths = [list(range(1, 40)), [1, 2, 3, *range(20, 45)], [1, 2, 3, 20, 21, 9, 9], [7, 7]]
    graphs = [demonstration_graph(str(i), [(path, [10 + i])]) for i, path in enumerate(paths)]
    [batch] = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=1000)
    return batch


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_states_and_gradients_are_those_of_the_modules(family: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, made = forest(), tiny_module(family, dtype, head_dim=32)
    token_ids, positions = torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T)
    torch.manual_seed(1)
    slope = torch.randn(batch.num_tokens, 64, dtype=dtype)
    states, gradients = [], []
    with forest_attention_in(made):
        compiled = hidden_states(made, token_ids, positions, ForestPass(batch))
        own = made.model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, forest=ForestPass(batch)
        ).last_hidden_state[0]
        for hidden in (compiled, own):
            made.zero_grad()
            hidden.backward(slope)
            states.append(hidden.detach())
            gradients.append([x.grad.clone() for x in made.parameters() if x.grad is not None])
    assert type(compiled.grad_fn).__name__ == "NormBackward"
    assert len(gradients[0]) == len(gradients[1]) == len(list(made.parameters()))
    assert relative_difference([states[0]], [states[1]]) <= tolerance
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_difference([ours], [theirs]) <= 3 * tolerance


PRODUCTS = ("aten::mm", "mkldnn::_linear_pointwise")
TRAINED = [["q_proj"], ["o_proj", "up_proj"], ["k_proj", "v_proj", "gate_proj", "down_proj"]]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_weights_that_are_not_trained_cost_no_product_and_change_nothing(
    family: str, dtype: torch.dtype, trained: list[str]
) -> None:
    batch, made = forest(), tiny_module(family, dtype, head_dim=32)
    token_ids, positions = torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T)
    torch.manual_seed(1)
    slope = torch.randn(batch.num_tokens, 64, dtype=dtype)

    def gradients_and_products() -> tuple[dict[str, torch.Tensor], int]:
        made.zero_grad()
        hidden = hidden_states(made, token_ids, positions, ForestPass(batch))
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            hidden.backward(slope)
        products = sum(event.count for event in recorded.key_averages() if event.key in PRODUCTS)
        return {name: x.grad.clone() for name, x in made.named_parameters() if x.grad is not None}, products

    with forest_attention_in(made):
        everything, all_products = gradients_and_products()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in (*trained, "embed_tokens"))
        some, products = gradients_and_products()
    assert len(some) == 3 * len(trained) + 1
    assert all(torch.equal(gradient, everything[name]) for name, gradient in some.items())
    groups = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert all_products - products == 3 * sum(not group & set(trained) for group in groups)


def test_a_replaced_weight_is_noticed() -> None:
    made, batch = tiny_module("llama", head_dim=32), forest()
    decoder = CompiledDecoder.of(made)
    assert decoder is not None
    weight = made.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data = weight.data.clone()
    with pytest.raises(ModelError, match="layer 1: a weight was replaced"):
        decoder(torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T), ForestPass(batch))
