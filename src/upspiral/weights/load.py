"""A Hugging Face folder becomes a module that the trainer updates and the embedded engine samples from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from upspiral.errors import ModelError
from upspiral.weights.families import CausalConfig, CausalModule, module_class
from upspiral.weights.fused import FusedLayer, fuse_projections
from upspiral.weights.models import check_model_folder


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A module whose projections are fused. Trainer and engine share it: nobody owns a second copy."""

    module: CausalModule
    layers: tuple[FusedLayer, ...]

    @classmethod
    def from_module(cls, module: CausalModule) -> LoadedModel:
        """Takes over a module that is already on its device and in its dtype. Raises ModelError for architectures and
        variants that the embedded engine does not compute."""
        module_class(module.config, "the module")
        module.set_attn_implementation("sdpa")
        return cls(module.eval(), fuse_projections(module))

    @property
    def config(self) -> CausalConfig:
        return self.module.config

    @property
    def head_size(self) -> int:
        """Width of a head, which need not be the hidden width divided by the number of heads."""
        attention: Any = self.module.model.layers[0].self_attn
        return attention.head_dim

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
    return LoadedModel.from_module(load_module(folder, dtype).to(_resolve_device(device)))  # pyright: ignore[reportArgumentType]


def load_module(folder: Path, dtype: str) -> CausalModule:
    """The module of a folder on the CPU, as transformers makes it. Errors as `load_model`."""
    check_model_folder(folder, tokenizer=False)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    module = _read(module_class(config, str(folder)), folder, getattr(torch, dtype))
    if config.tie_word_embeddings:
        module.tie_weights()
    return module


def _read(family: type[CausalModule], folder: Path, dtype: torch.dtype) -> CausalModule:
    transformers_logging.disable_progress_bar()
    try:
        module, report = family.from_pretrained(
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


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device = 'cuda' but torch finds no CUDA device; use 'auto' or 'cpu'")
    return device
