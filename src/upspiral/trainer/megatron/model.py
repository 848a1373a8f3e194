"""A Megatron model that computes a forest batch: GPTModel with the local layer specification and our attention.

No Transformer Engine and no Apex. On tensor-parallel ranks every rank has all tokens, and its part of the heads, of the
inner width and of the vocabulary.
Shapes: B = 1, T tokens, M targets, H query heads and K key heads of this rank, D head width, W hidden width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from upspiral.trainer.attention import ForestPass, forest_attention
from upspiral.trainer.division import VOCABULARY_MULTIPLE
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.logprob import ChunkedLogprob
from upspiral.trainer.megatron.experts import ForestRouter, use_own_experts
from upspiral.trainer.megatron.vocabulary import VocabularyParallelLogprob
from upspiral.trainer.recompute import recomputed_layers


class MegatronModel:
    """The part of a model on this rank. Its weights have any values until they are loaded."""

    def __init__(self, like: Any, *, dtype: torch.dtype, device: str, group: Any) -> None:
        """`like`: transformers' model, which may be without storage. `group`: the tensor-parallel ranks, as Megatron
        knows them."""
        config = like.config
        self._group, self._vocabulary = group, config.vocab_size
        own = _transformer_config(config, dtype=dtype, device=device, ranks=group.size())
        module = GPTModel(
            own,
            _for_forests(get_gpt_decoder_block_spec(own, False, normalization="RMSNorm")),
            vocab_size=-(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            max_sequence_length=config.max_position_embeddings,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            position_embedding_type="none",  # angles come from positions in a forest, which Megatron does not know
        )
        use_own_experts(module)
        # No dropout: the policy that is trained is the one that sampled.
        self.module: Any = module.to(device=device, dtype=dtype).eval()
        self._frequencies = like.model.rotary_emb.inv_freq.float().to(device)  # of RoPE, [D / 2], scaling included

    def target_logprobs(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        """See `trainer/logprob.py`; the same on every tensor-parallel rank."""
        device = self._frequencies.device
        token_ids, positions, sources, targets = (
            torch.from_numpy(array).to(device)
            for array in (batch.token_ids_T, batch.positions_T, batch.sources_M, batch.targets_M)
        )
        hidden_MW = self._hidden_states(token_ids, positions, forest).index_select(0, sources)
        output = self.module.output_layer.weight
        if output is None:
            output = self.module.shared_embedding_or_output_weight()
        most = len(output)
        first = self._group.rank() * most
        output = output[: max(0, self._vocabulary - first)]  # the rest is padding
        if self._group.size() == 1:
            return ChunkedLogprob.apply(hidden_MW, output, targets, temperature)  # pyright: ignore[reportReturnType]
        return VocabularyParallelLogprob.apply(  # pyright: ignore[reportReturnType]
            hidden_MW, output, targets - first, temperature, self._group, most
        )

    def _hidden_states(self, token_ids_T: Tensor, positions_T: Tensor, forest: ForestPass) -> Tensor:
        """[T, W] after the last norm."""
        angles_TD = torch.outer(positions_T.to(self._frequencies.dtype), self._frequencies).repeat(1, 2)
        embedded = self.module.embedding(input_ids=token_ids_T[None], position_ids=positions_T[None])
        with recomputed_layers(self.module.decoder.layers if forest.recompute else ()):
            # Megatron passes on what it is given as a mask to our attention, and looks at it nowhere else.
            hidden_T1W = self.module.decoder(
                hidden_states=embedded, attention_mask=forest, rotary_pos_emb=angles_TD[:, None, None]
            )
        return hidden_T1W[:, 0]


class ForestCoreAttention(nn.Module):
    """Takes the place of Megatron's DotProductAttention; its mask is a ForestPass."""

    def __init__(self, *, layer_number: int, **others: Any) -> None:
        super().__init__()
        self.layer_idx = layer_number - 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, forest: ForestPass, **others: Any) -> Tensor:
        """query [T,1,H,D], key and value [T,1,K,D] -> [T,1,H*D]"""
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        attended_1THD, _ = forest_attention(self, query, key, value, forest=forest)
        return attended_1THD.flatten(2).transpose(0, 1)


def _for_forests(block: Any) -> Any:
    """A specification of Megatron's, with our parts in it."""
    block = copy.deepcopy(block)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = ForestCoreAttention
        if hasattr(layer.submodules.mlp.submodules, "router"):
            layer.submodules.mlp.submodules.router = ForestRouter
    return block


def _transformer_config(config: Any, *, dtype: torch.dtype, device: str, ranks: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_width(config),
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=config.model_type != "llama",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device == "cpu",
        perform_initialization=False,
        # What Transformer Engine, Apex or a compiler would do better:
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **_expert_keys(config),
    )


def _expert_keys(config: Any) -> dict[str, Any]:
    pattern = expert_pattern(config)
    if not any(pattern):
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": pattern,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_token_dispatcher_type": "allgather",  # which is replaced, and cheap to make
        "moe_grouped_gemm": False,
    }


def expert_pattern(config: Any) -> list[int]:
    """For each layer, 1 where it has experts."""
    if not getattr(config, "num_experts", 0):
        return [0] * config.num_hidden_layers
    return [
        int(number not in config.mlp_only_layers and (number + 1) % config.decoder_sparse_step == 0)
        for number in range(config.num_hidden_layers)
    ]


def head_width(config: Any) -> int:
    """Which need not be the hidden width divided by the number of heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
