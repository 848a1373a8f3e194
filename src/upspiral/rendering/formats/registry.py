"""All formats. A template's format is found by what it writes, never by a model's name."""

from __future__ import annotations

from upspiral.rendering.formats.base import ToolFormat
from upspiral.rendering.formats.deepseek import DeepSeek
from upspiral.rendering.formats.glm import Glm
from upspiral.rendering.formats.hermes import Hermes
from upspiral.rendering.formats.llama3 import PYTHON_TAG, Llama3
from upspiral.rendering.formats.mistral import MistralArguments, MistralList
from upspiral.rendering.formats.qwen_xml import QwenXml

HERMES = Hermes()
FORMATS: tuple[ToolFormat, ...] = (
    HERMES,
    QwenXml(),
    Glm("glm", "\n"),
    Glm("glm-compact", ""),
    Llama3("llama3", ""),
    Llama3("llama3-python-tag", PYTHON_TAG),
    MistralList("mistral-list", " "),
    MistralList("mistral-list-compact", ""),
    MistralArguments(),
    DeepSeek("deepseek-v3", fenced=True),
    DeepSeek("deepseek-v3.1", fenced=False),
)
