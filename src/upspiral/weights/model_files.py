"""The weights in a Hugging Face folder, one parameter at a time: who divides a model never needs to hold it whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from upspiral.errors import ModelError
from upspiral.weights.families import CausalModule, module_class
from upspiral.weights.models import WEIGHTS_INDEX, check_model_folder


class ModelFiles:
    """Read when they are asked for; the operating system shares what several ranks of a machine read."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError when the folder is none of a model that upspiral trains."""
        check_model_folder(folder, tokenizer=False)
        self._folder = folder
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self._family: Any = module_class(self.config, str(folder))
        self._open: dict[str, Any] = {}
        index = folder / WEIGHTS_INDEX
        self._places: dict[str, str] = (
            json.loads(index.read_text())["weight_map"]
            if index.is_file()
            else dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        )

    def skeleton(self) -> CausalModule:
        """The module with parameters that have shapes and no storage (device "meta"), float32; buffers are real."""
        with torch.device("meta"):
            module = self._family(self.config)
        module.model.rotary_emb = type(module.model.rotary_emb)(self.config)
        return module.eval()

    @torch.no_grad()
    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> None:
        """Gives a part of the skeleton, whose parameters' names begin with `prefix`, its weights on a device, rounded
        to `dtype`. Those that have storage stay. Raises ModelError for what is not in the files."""
        for name, parameter in list(module.named_parameters()):
            if not parameter.is_meta:
                continue
            whole = self._parameter(prefix + name)
            if whole.shape != parameter.shape:
                raise ModelError(
                    f"{prefix + name} in {self._folder} is {list(whole.shape)}, but its config.json asks for "
                    f"{list(parameter.shape)}; fetch the model again"
                )
            owner, _, own = name.rpartition(".")
            # A copy: what comes from a file may be the mapped file itself.
            filled = nn.Parameter(whole.to(device, dtype, copy=True).to(parameter.dtype))
            module.get_submodule(owner).register_parameter(own, filled)

    def _parameter(self, name: str) -> Tensor:
        """As the module has it: experts stacked, which files have one by one (`names.py`)."""
        layer, _, own = name.rpartition(".experts.")
        if own == "gate_up_proj":
            each = range(self.config.num_experts)
            pairs = ([self.tensor(f"{layer}.experts.{n}.{part}_proj.weight") for part in ("gate", "up")] for n in each)
            return torch.stack([torch.cat(pair) for pair in pairs])
        if own == "down_proj":
            each = range(self.config.num_experts)
            return torch.stack([self.tensor(f"{layer}.experts.{n}.down_proj.weight") for n in each])
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """By its name in the files, as it is there. Raises ModelError where there is none."""
        if name not in self._places:
            raise ModelError(
                f"the weights in {self._folder} lack {name}, which its config.json asks for; fetch the model again, or "
                "set tie_word_embeddings if only lm_head.weight is missing"
            )
        return self._file(self._places[name]).get_tensor(name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"the weights in {self._folder} cannot be read ({error}); fetch the model again"
                ) from error
        return self._open[name]
