"""A Hugging Face folder becomes a module that the trainer updates and the embedded engine samples from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from upspiral.errors import ModelError
from upspiral.weights.fused import FusedLayer, fuse_projections
from upspiral.weights.models import check_model_folder

_ROPE_THAT_DEPENDS_ON_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A Llama-family module whose projections are fused. Trainer and engine share it: nobody owns a second copy."""

    module: LlamaForCausalLM
    layers: tuple[FusedLayer, ...]

    @classmethod
    def from_module(cls, module: LlamaForCausalLM) -> LoadedModel:
        """Takes over a module that is already on its device and in its dtype. Raises ModelError for variants of Llama
        that the embedded engine does not compute."""
        _check_variant(module.config, "the module")
        module.set_attn_implementation("sdpa")
        return cls(module.eval(), fuse_projections(module))

    @property
    def config(self) -> LlamaConfig:
        return self.module.config

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def check_fused(self) -> None:
        """Raises ModelError when a weight was replaced instead of updated in place."""
        for index, layer in enumerate(self.layers):
            layer.check(f"layer {index}")


def load_model(folder: Path, *, dtype: str, device: str) -> LoadedModel:
    """Loads config.json and safetensors weights; nothing is downloaded.

    `dtype` is "bfloat16" or "float32", `device` "auto", "cpu" or "cuda". Raises ModelError when the folder, its weights
    or its architecture cannot be used.
    """
    check_model_folder(folder, tokenizer=False)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_variant(config, str(folder))
    module = _read(folder, getattr(torch, dtype))
    if config.tie_word_embeddings:
        module.tie_weights()
    return LoadedModel.from_module(module.to(_resolve_device(device)))  # pyright: ignore[reportArgumentType]


def _read(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    transformers_logging.disable_progress_bar()
    try:
        module, report = LlamaForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )  # pyright: ignore[reportGeneralTypeIssues]  # a pair, with output_loading_info
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights in {folder} cannot be read ({error}); fetch the model again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would leave these at random values and carry on.
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors that its config.json asks for, the first is "
            f"{missing[0]}; fetch the model again, or set tie_word_embeddings if only lm_head.weight is missing"
        )
    return module


def _check_variant(config: PretrainedConfig, source: str) -> None:
    if not isinstance(config, LlamaConfig):
        names = ", ".join(config.architectures or [config.model_type])
        raise ModelError(f"{source} has the architecture {names}; upspiral trains the Llama family (LlamaForCausalLM)")
    if config.attention_bias or config.mlp_bias:
        raise ModelError(f"{source} sets attention_bias or mlp_bias; Llama models with biases are not supported")
    if config.hidden_act != "silu":
        raise ModelError(f"{source} sets hidden_act = {config.hidden_act!r}; only 'silu' is supported")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in _ROPE_THAT_DEPENDS_ON_LENGTH:
        raise ModelError(f"{source} sets rope_type = {rope!r}, which changes with the length; it is not supported")


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device = 'cuda' but torch finds no CUDA device; use 'auto' or 'cpu'")
    return device
