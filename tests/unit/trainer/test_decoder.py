"""The compiled decoder beside transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
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


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    made = LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made


def forest() -> ForestBatch:
    paths = [list(range(1, 40)), [1, 2, 3, *range(20, 45)], [1, 2, 3, 20, 21, 9, 9], [7, 7]]
    graphs = [demonstration_graph(str(i), [(path, [10 + i])]) for i, path in enumerate(paths)]
    [batch] = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=1000)
    return batch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_states_and_gradients_are_those_of_the_modules(dtype: torch.dtype, tolerance: float) -> None:
    batch, made = forest(), model(dtype)
    token_ids, positions = torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T)
    torch.manual_seed(1)
    slope = torch.randn(batch.num_tokens, 96, dtype=dtype)
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
    assert len(gradients[0]) == len(gradients[1]) == len(list(made.parameters())) - 1  # all but the output layer
    assert relative_difference([states[0]], [states[1]]) <= tolerance
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_difference([ours], [theirs]) <= 3 * tolerance


def test_a_replaced_weight_is_noticed() -> None:
    made, batch = model(torch.float32), forest()
    compiled = rows()
    assert compiled is not None
    decoder = CompiledDecoder(made, compiled)
    weight = made.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data = weight.data.clone()
    with pytest.raises(ModelError, match="layer 1: a weight was replaced"):
        decoder(torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T), ForestPass(batch))
