"""Which part of which Hugging Face tensor lies where in a Megatron model of one tensor-parallel rank.

Megatron keeps some of them together: query heads, key head and value head of one group after the other (qkv), and the
rank's part of gate above its part of up. Everything here is a view of the weights as they are, so the same list says
what to load into, what to publish and, for tensors that are laid out alike, what a checkpoint holds.

Legend: G key groups of the rank, R query heads of a group, D head width, W hidden width, F inner width of the rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from upspiral.trainer.megatron.model import head_width
from upspiral.weights.names import EMBEDDING, OUTPUT

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A rank's part of a Hugging Face tensor."""

    name: str
    tensor: Tensor
    """A view. The Hugging Face tensor may have fewer dimensions: then it is this one with the first ones joined."""
    dimension: int | None
    """Along which the parts of all ranks stand one after the other; None: each rank has the whole tensor."""
    rows: int | None = None
    """Of the Hugging Face tensor, where padding follows it."""

    def take(self, whole: Tensor, rank: int, ranks: int) -> None:
        """Writes the rank's part of the Hugging Face tensor here. RuntimeError where it has another size."""
        shape = list(self.tensor.shape)
        if self.dimension is not None:
            shape[self.dimension] *= ranks
        if self.rows is not None:
            whole = torch.cat([whole, whole.new_zeros(shape[0] - len(whole), *whole.shape[1:])])
        whole = whole.view(shape)
        self.tensor.copy_(whole if self.dimension is None else whole.chunk(ranks, self.dimension)[rank])

    def gathered(self, group: Any) -> Tensor:
        """The whole Hugging Face tensor, on every rank of the group, all of which must ask for it."""
        whole = self.tensor
        if self.dimension is not None:
            own = whole.contiguous()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            distributed.all_gather(parts, own, group=group)
            whole = torch.cat(parts, self.dimension)
        whole = whole.flatten(0, -2) if whole.ndim > 1 else whole
        return whole[: self.rows]


class Names:
    """The mapping for one model, by transformers' config of it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._of_layer: dict[str, Callable[[str, Tensor], Iterator[Part]]] = {
            "input_layernorm.weight": _one("input_layernorm", None),
            "pre_mlp_layernorm.weight": _one("post_attention_layernorm", None),
            "self_attention.linear_qkv.weight": self._qkv,
            "self_attention.linear_proj.weight": _one("self_attn.o_proj", 1),
            "self_attention.q_layernorm.weight": _one("self_attn.q_norm", None),
            "self_attention.k_layernorm.weight": _one("self_attn.k_norm", None),
            "mlp.router.weight": _one("mlp.gate", None),
            "mlp.linear_fc1.weight": _gate_up("mlp"),
            "mlp.linear_fc2.weight": _one("mlp.down_proj", 1),
        }

    def parts(self, name: str, tensor: Tensor) -> Iterator[Part]:
        """Of a parameter by Megatron's name, or of a tensor that is laid out as it."""
        tensor = tensor.detach()
        rows = self.config.vocab_size
        if name == "embedding.word_embeddings.weight":
            yield Part(EMBEDDING, tensor, 0, rows)
        elif name == "output_layer.weight":
            yield Part(OUTPUT, tensor, 0, rows)
        elif name == "decoder.final_layernorm.weight":
            yield Part("model.norm.weight", tensor, None)
        else:
            layer = _LAYER.fullmatch(name)
            assert layer is not None, f"Megatron has a parameter that is not known here: {name}"
            prefix, own = f"model.layers.{layer[1]}.", layer[2]
            if expert := _EXPERT.fullmatch(own):
                prefix, own = f"{prefix}mlp.experts.{expert[1]}.", expert[2]
                yield from _OF_EXPERT[own](prefix, tensor)
            else:
                yield from self._of_layer[own](prefix, tensor)

    def gathered(self, module: Any, group: Any) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and whole tensors, one by one; all ranks of the group must take them all."""
        for name, parameter in module.named_parameters():
            for part in self.parts(name, parameter):
                yield part.name, part.gathered(group)

    def _qkv(self, prefix: str, tensor: Tensor) -> Iterator[Part]:
        config = self.config
        shared = config.num_attention_heads // config.num_key_value_heads
        grouped = tensor.view(-1, shared + 2, head_width(config), tensor.shape[1])
        yield Part(f"{prefix}self_attn.q_proj.weight", grouped[:, :shared], 0)  # [G, R, D, W]
        yield Part(f"{prefix}self_attn.k_proj.weight", grouped[:, shared], 0)  # [G, D, W]
        yield Part(f"{prefix}self_attn.v_proj.weight", grouped[:, shared + 1], 0)


def _one(own: str, dimension: int | None) -> Callable[[str, Tensor], Iterator[Part]]:
    return lambda prefix, tensor: iter([Part(f"{prefix}{own}.weight", tensor, dimension)])


def _gate_up(own: str) -> Callable[[str, Tensor], Iterator[Part]]:
    """[2 F, W]"""
    dot = f"{own}." if own else ""
    names = f"{dot}gate_proj", f"{dot}up_proj"

    def parts(prefix: str, tensor: Tensor) -> Iterator[Part]:
        for name, half in zip(names, tensor.chunk(2), strict=True):
            yield Part(f"{prefix}{name}.weight", half, 0)

    return parts


_OF_EXPERT = {"linear_fc1.weight": _gate_up(""), "linear_fc2.weight": _one("down_proj", 1)}
