"""LoRA (arXiv 2106.09685) on weights that stay merged: W = base + B A * alpha / rank.

Trainer and engine compute with W, in place, as they do when all weights are trained; so they agree as exactly. The base
is kept beside it and every merge starts from it: to take the last product off again would leave its rounding behind.

Shapes: O outputs and I inputs of a layer, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from upspiral.config.models import LoraConfig
from upspiral.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedWeight:
    """One linear layer's weight and the factors of what is added to it."""

    name: str
    """Of the layer, such as "model.layers.0.self_attn.q_proj"."""
    merged_OI: Tensor
    """The weight of the model itself."""
    base_OI: Tensor
    down_RI: Tensor
    """A."""
    up_OR: Tensor
    """B."""


class Adapter:
    """The factors of all adapted weights of a model."""

    def __init__(self, module: Any, config: LoraConfig) -> None:
        """Makes the weights that `config` names trainable, and no others; none changes yet, for B starts at zero. A is
        drawn as PEFT draws it, from torch's generator. Raises ConfigError for a name that the model does not have."""
        self.config = config
        self.scale = config.alpha / config.rank
        layers = _targets(module, config.target_modules)
        self.base_sums = [_sum_of_bits(parameter) for parameter in module.parameters()]
        """Tell another base model, whose weights no checkpoint of factors holds."""
        module.requires_grad_(False)
        self.weights = tuple(_adapted(name, layer, config.rank) for name, layer in layers.items())

    @property
    def factors(self) -> list[Tensor]:
        """A and B of each adapted weight in turn, in float32 at least."""
        return [factor for each in self.weights for factor in (each.down_RI, each.up_OR)]

    @property
    def target_modules(self) -> list[str]:
        """Ends of names, as in the config, that mean the adapted layers and no others; never empty."""
        return list(self.config.target_modules) or sorted({each.name.rpartition(".")[2] for each in self.weights})

    @torch.no_grad()
    def merge(self) -> None:
        """Makes the model's weights what the factors say, in place. The same factors give the same bits."""
        for each in self.weights:
            each.merged_OI.copy_(each.base_OI + each.up_OR @ each.down_RI * self.scale)


def _sum_of_bits(tensor: Tensor) -> int:
    """Exact in any order, unlike a sum of what the bits mean."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(integers).sum(dtype=torch.int64))


def _targets(module: Any, wanted: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that a name in `wanted` is the end of, in the model's order; all for no names."""
    output = module.get_output_embeddings()
    layers = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and layer is not output
    }
    for end in wanted:
        if not any(_ends(name, end) for name in layers):
            raise ConfigError(_no_such_layer(end, list(layers)))
    return {name: layer for name, layer in layers.items() if not wanted or any(_ends(name, end) for end in wanted)}


def _ends(name: str, end: str) -> bool:
    """PEFT's rule, which reads the same list."""
    return name == end or name.endswith(f".{end}")


def _no_such_layer(end: str, names: Sequence[str]) -> str:
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(end, [*short, *names], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(short)}"
    return f"trainer.lora.target_modules: no linear layer of the decoder has a name that ends with {end!r}; {hint}"


def _adapted(name: str, layer: nn.Linear, rank: int) -> AdaptedWeight:
    merged = layer.weight.requires_grad_()
    dtype = torch.float64 if merged.dtype == torch.float64 else torch.float32
    down, up = (
        torch.zeros(shape, dtype=dtype, device=merged.device)
        for shape in ((rank, layer.in_features), (layer.out_features, rank))
    )
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return AdaptedWeight(name, merged, merged.detach().clone(), down, up)
