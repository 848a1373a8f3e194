"""A GGUF file becomes a Hugging Face folder. Needs upspiral[train]; nothing is imported before it is called.

Quantised weights are lossy: what comes out is the dequantised model, not the one it was made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upspiral.errors import ModelError


def convert_gguf(gguf: Path, target: Path, *, rms_norm_eps: float) -> None:
    """Writes bfloat16 safetensors, config, generation config and tokenizer of a Llama-family GGUF file to `target`.

    `rms_norm_eps` is given because GGUF stores it as float32, which reads back as 9.999999747e-06. Raises ModelError
    when upspiral[train] is not installed or transformers cannot read the file.
    """
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"converting a model needs {error.name}: pip install 'upspiral[train]'") from error
    logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, **_dense(transformers), dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(f"transformers {transformers.__version__} cannot read {gguf.name}: {error}") from error
    config = loaded.config
    config.rms_norm_eps = rms_norm_eps
    # A model that came from GGUF refuses save_pretrained on some versions, so its tensors move to a fresh one.
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dense(transformers: Any) -> dict[str, Any]:
    """Newer versions keep GGUF weights packed unless told otherwise; older ones know only dense and no such option."""
    if hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}
