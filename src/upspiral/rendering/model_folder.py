"""What rendering needs from a Hugging Face folder: tokenizer, chat template and the ids that end an answer."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from upspiral.errors import ModelError, TemplateError
from upspiral.rendering.chat_template import ChatTemplate

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; give a Hugging Face model folder with a fast tokenizer "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise ModelError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error
    # A post-processor would add tokens of its own and trim white space out of the offsets; the template writes it all.
    tokenizer.post_processor = processors.Sequence([])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The folder's template; ours when the folder has none or has one that cannot do tools and the model speaks ChatML.

    Raises TemplateError when there is neither.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {key: text for key in _SPECIAL_TOKEN_KEYS if (text := _token_text(config.get(key)))}
    own = _own_template(folder, config, special_tokens)
    if own is not None and own.knows_tools():
        return own
    if all(tokenizer.token_to_id(token) is not None for token in CHATML_TOKENS):
        source = resources.files("upspiral.rendering").joinpath("templates/chatml_tools.jinja").read_text("utf-8")
        return ChatTemplate(source, name="chatml_tools.jinja (shipped with upspiral)", special_tokens=special_tokens)
    if own is None:
        raise TemplateError(
            f"{folder} has no chat template (neither chat_template.jinja nor tokenizer_config.json's chat_template) "
            "and no ChatML tokens; use an instruction-tuned model or add chat_template.jinja"
        )
    return own


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer, from the first of generation_config.json, config.json and tokenizer_config.json that
    names some."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    token = _token_text(_read_json(folder / "tokenizer_config.json").get("eos_token"))
    found = tokenizer.token_to_id(token) if token else None
    return () if found is None else (found,)


def _own_template(folder: Path, config: dict[str, Any], special_tokens: dict[str, str]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text("utf-8"), name=str(path), special_tokens=special_tokens)
    source = config.get("chat_template")
    if isinstance(source, list):  # older files name several
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("tool_use", named.get("default"))
    if not source:
        return None
    name = f"{folder / 'tokenizer_config.json'} (chat_template)"
    return ChatTemplate(source, name=name, special_tokens=special_tokens)


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
