"""Trained weights become a Hugging Face folder, or an adapter a PEFT folder, that others load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from upspiral.errors import ModelError
from upspiral.rendering.model_folder import load_template, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from upspiral.weights.adapter import Adapter
    from upspiral.weights.families import CausalModule

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def export_hf(module: CausalModule, source: Path, target: Path) -> Path:
    """Writes the module's weights and config, and the tokenizer of `source`, the folder that the module came from.

    The chat template is the one that the model was trained with: ours, where that of `source` cannot do tools. Returns
    `target`, which appears whole or not at all. Raises ModelError when it exists or cannot be written.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()

    def write(folder: Path) -> None:
        module.save_pretrained(folder, state_dict=_independent_copies(module.state_dict()))
        _write_tokenizer(source, folder)

    return _write_whole(target, write)


def export_peft(adapter: Adapter, source: Path, target: Path) -> Path:
    """Writes the factors as PEFT does (adapter_config.json, adapter_model.safetensors), in float32, and the tokenizer
    as `export_hf`. `source` is noted as the base model.

    PEFT's own merge gives the weights that upspiral sampled from; applied beside the base, the same to rounding.
    Returns `target`, which appears whole or not at all. Raises ModelError when it exists or cannot be written.
    """
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    rank, alpha = adapter.config.rank, adapter.config.alpha
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=str(source),
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # pyright: ignore[reportArgumentType]
        target_modules=adapter.target_modules,
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{each.name}.lora_{letter}.weight": factor.detach().contiguous()
        for each in adapter.weights
        for letter, factor in (("A", each.down_RI), ("B", each.up_OR))
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(source, folder)

    return _write_whole(target, write)


def _write_whole(target: Path, write: Callable[[Path], None]) -> Path:
    """`write` fills a folder that becomes `target` at the end."""
    if target.exists():
        raise ModelError(f"{target} exists already; choose another folder or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
            folder = Path(work) / "model"
            write(folder)
            folder.rename(target)
    except OSError as error:
        raise ModelError(f"{target} could not be written: {error}; free space or choose another folder") from error
    return target


def _independent_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused projections are views of one tensor, which safetensors refuses; tied tensors stay the same object."""
    copies: dict[tuple[int, int], Tensor] = {}
    return {
        name: copies.setdefault((tensor.data_ptr(), tensor.numel()), tensor.detach().clone())
        for name, tensor in state.items()
    }


def _write_tokenizer(source: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    template = load_template(source, load_tokenizer(source))
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        # Some programs would prefer an old template in here to the file.
        entries = json.loads(config.read_text(encoding="utf-8"))
        entries.pop("chat_template", None)
        config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
