"""The families of models that upspiral loads, samples from and trains: those whose layers the embedded engine computes.

Their modules are transformers' own and have the same names for the same parts; what a layer has beside them (norms of
queries and keys, experts) is found on the layer itself, so nothing else needs to ask for the family.
"""

from __future__ import annotations

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from upspiral.errors import ModelError

CausalModule = LlamaForCausalLM | Qwen3ForCausalLM | Qwen3MoeForCausalLM
CausalConfig = LlamaConfig | Qwen3Config | Qwen3MoeConfig

_MODULE_OF: dict[type[PretrainedConfig], type[CausalModule]] = {
    LlamaConfig: LlamaForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
}
_ROPE_THAT_DEPENDS_ON_LENGTH = ("dynamic", "longrope")


def module_class(config: PretrainedConfig, source: str) -> type[CausalModule]:
    """The class of transformers that computes a config. Raises ModelError, naming `source`, for other architectures and
    for variants that the embedded engine does not compute."""
    found = _MODULE_OF.get(type(config))
    if found is None:
        names = ", ".join(config.architectures or [config.model_type])
        known = ", ".join(each.__name__ for each in _MODULE_OF.values())
        raise ModelError(f"{source} has the architecture {names}; upspiral trains {known}")
    _check_variant(config, source)
    return found


def _check_variant(config: PretrainedConfig, source: str) -> None:
    if config.attention_bias or getattr(config, "mlp_bias", False):
        raise ModelError(f"{source} sets attention_bias or mlp_bias; models with biases are not supported")
    if config.hidden_act != "silu":
        raise ModelError(f"{source} sets hidden_act = {config.hidden_act!r}; only 'silu' is supported")
    if getattr(config, "use_sliding_window", False):
        raise ModelError(f"{source} sets use_sliding_window; attention over a part of the context is not supported")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in _ROPE_THAT_DEPENDS_ON_LENGTH:
        raise ModelError(f"{source} sets rope_type = {rope!r}, which changes with the length; it is not supported")
