"""A model's shape, read from its config.json, and what follows from it alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of the families that upspiral trains: gated feed-forward blocks, grouped keys, all layers alike."""

    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward block, or of one expert."""
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    """Whether the output layer is the embedding."""
    experts: int = 0
    """Of a layer; 0: its block is dense."""
    experts_per_token: int = 0

    @classmethod
    def of_folder(cls, folder: Path) -> ModelShape:
        """Raises ModelError when config.json is missing or says too little."""
        try:
            config = json.loads((folder / "config.json").read_text())
            heads = config["num_attention_heads"]
            experts = config.get("num_experts") or config.get("num_local_experts") or 0
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                inner=config["moe_intermediate_size"] if experts else config["intermediate_size"],
                heads=heads,
                key_heads=config.get("num_key_value_heads") or heads,
                head_width=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings")),
                experts=experts,
                experts_per_token=config.get("num_experts_per_tok") or 0,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}/config.json does not give the model's shape ({error!r})") from error

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return self._attention + max(1, self.experts) * self._block + self._router + 2 * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Embedding, output layer and the last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters

    @property
    def layer_weights_per_token(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        return self._attention + max(1, self.experts_per_token) * self._block + self._router

    @property
    def weights_per_token(self) -> int:
        """Of all layers; the output layer comes on top where a token predicts something."""
        return self.layers * self.layer_weights_per_token

    def forward_flops(self, tokens: float, context: float, predicting: float) -> float:
        """Of `tokens` tokens that see `context` tokens each on average, `predicting` of which go through the output
        layer: 2 a weight and token, and 4 a head's width, token and token seen (Kaplan et al. 2020, table 1; both
        products of attention)."""
        seen = 4 * self.layers * self.heads * self.head_width * context
        return tokens * (2 * self.weights_per_token + seen) + predicting * 2 * self.vocabulary * self.hidden

    def training_flops(self, tokens: float, context: float, predicting: float, *, checkpointing: bool) -> float:
        """Of forward and backward passes. A backward pass costs two forward passes (Kaplan et al. 2020); checkpointing
        computes the layers once more. Ours computes the logits and the attention's scores again, whatever else
        (trainer/logprob.py; Dao et al. 2022, section 3.1)."""
        again = 1 if checkpointing else 0
        seen = 4 * self.layers * self.heads * self.head_width * context
        layers = (3 + again) * 2 * self.weights_per_token + (3.5 + again) * seen
        return tokens * layers + predicting * 4 * 2 * self.vocabulary * self.hidden

    def kv_bytes(self, width: int) -> int:
        """Keys and values of one token, in numbers of `width` bytes."""
        return 2 * self.layers * self.key_heads * self.head_width * width

    def activation_bytes(self, width: int) -> int:
        """What a layer keeps of a token for its gradient: input, middle, both norms and the attention's output,
        queries, keys and values, and three of the feed-forward block's width (Korthikanti et al. 2022, section 4.1, for
        gated blocks and without attention scores, which are computed again). Each expert keeps four of its width, and
        the token once where it comes in and twice where it goes out, before and after it is weighted."""
        kept = 4 * self.hidden + (2 * self.heads + 2 * self.key_heads) * self.head_width
        if self.experts:
            return width * (kept + self.experts_per_token * (4 * self.inner + 3 * self.hidden))
        return width * (kept + 3 * self.inner)

    @property
    def _attention(self) -> int:
        return self.hidden * self.head_width * (2 * self.heads + 2 * self.key_heads)

    @property
    def _block(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def _router(self) -> int:
        return self.experts * self.hidden
