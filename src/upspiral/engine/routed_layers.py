"""Which layers of a model have experts: servers tell what every layer chose, trainers want those with a choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """How servers lay out which experts computed a token: of every layer, those without experts included."""

    layers: int
    with_experts: Sequence[int]
    """The numbers of those that have experts, ascending."""
    experts_of_token: int

    @classmethod
    def of_folder(cls, folder: Path) -> RoutedLayers:
        """From a Qwen3-MoE's config.json. Raises ConfigError when the model has no experts, ModelError when the file
        says too little."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            layers, experts = int(config["num_hidden_layers"]), int(config.get("num_experts") or 0)
            every, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
            of_token = int(config["num_experts_per_tok"]) if experts else 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder}/config.json does not give the model's experts ({error!r})") from error
        routed = [layer for layer in range(layers) if experts and layer not in dense and (layer + 1) % every == 0]
        if not routed:
            raise ConfigError(
                'engine.routes = "replay", but the model has no experts; drop this key or choose a mixture of experts'
            )
        return cls(layers, routed, of_token)
