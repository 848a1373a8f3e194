"""Rendering: messages to token ids, by the folder's template or ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.errors import ModelError, TemplateError
from upspiral.rendering.renderer import Renderer
from upspiral.types import Message, ToolCall, ToolSpec

BASH = ToolSpec(
    "bash",
    "Run a shell command.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
CALL = ToolCall("call_1", "bash", '{"command": "ls \\"été\\""}')
CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "How many files? 😀"),
    Message("assistant", "Looking.", tool_calls=(CALL, CALL)),
    Message("tool", "3 files", tool_call_id="call_1"),
    Message("tool", "", tool_call_id="call_1"),
    Message("assistant", "3"),
    Message("user", "Thanks"),
]

# A template in the manner of Qwen: results of parallel calls share one turn.
QWEN_LIKE = (
    "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for c in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ (c.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
CHANGES_THE_PAST = QWEN_LIKE.replace("m.content }}", "(m.content if loop.last else '(old)') }}", 1).replace(
    "'<|im_start|>' + m.role + '\n' + m.content", "'<|im_start|>' + m.role + '\n' + (m.content if loop.last else '~')"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer.from_folder(folder)


def with_template(tmp_path: Path, template: str) -> Renderer:
    folder = make_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    return Renderer.from_folder(folder)


def joined(segments) -> list[int]:  # pyright: ignore[reportMissingParameterType]
    return [int(index) for segment in segments for index in segment.token_ids]


def test_a_template_that_ignores_tools_is_replaced_by_ours(renderer: Renderer) -> None:
    renderer.check_append_only()
    assert "chatml_tools.jinja" in renderer.template_name
    assert renderer.stop_token_ids == (2,)
    assert renderer.generation_prompt.dtype == np.int32


def test_the_shipped_template_word_by_word(renderer: Renderer) -> None:
    texts = [renderer.spell(s.token_ids.tolist()) for s in renderer.render(CONVERSATION, [BASH])]
    assert texts[0] == (
        "<|im_start|>system\nBe brief.\n\n"
        'To use a tool, write <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\nTools:\n'
        '{"name":"bash","description":"Run a shell command.","parameters":{"type":"object",'
        '"properties":{"command":{"type":"string"}},"required":["command"]}}<|im_end|>\n'
    )
    call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls \\"été\\""}}\n</tool_call>'
    assert texts[1:4] == [
        "<|im_start|>user\nHow many files? 😀<|im_end|>\n",
        f"<|im_start|>assistant\nLooking.\n{call}\n{call}<|im_end|>\n",
        "<|im_start|>tool\n3 files<|im_end|>\n",
    ]


def test_without_a_system_message_the_tools_stand_in_the_first_segment(renderer: Renderer) -> None:
    segments = renderer.render(CONVERSATION[1:], [BASH])
    assert [s.role for s in segments] == [m.role for m in CONVERSATION[1:]]
    text = renderer.spell(segments[0].token_ids.tolist())
    assert text.startswith("<|im_start|>system\nTo use a tool") and "How many files" in text


def test_one_segment_per_message_and_prefixes_agree(renderer: Renderer) -> None:
    whole = renderer.render(CONVERSATION, [BASH])
    assert [s.message for s in whole] == CONVERSATION
    for end in range(1, len(CONVERSATION)):
        part = joined(renderer.render(CONVERSATION[:end], [BASH]))
        assert joined(whole)[: len(part)] == part
    assert renderer.count(CONVERSATION, [BASH]) == len(joined(whole)) + len(renderer.generation_prompt)
    assert renderer.render([], [BASH]) == []


@pytest.mark.parametrize("finish", ["stop", "length", "cancelled"])
def test_the_tail_completes_the_stored_answer(renderer: Renderer, finish: str) -> None:
    """Rendered history + generation prompt + answer + tail is what rendering everything at once would give."""
    before, answer, tail = CONVERSATION[:2], CONVERSATION[2], CONVERSATION[3:5]
    call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls \\"été\\""}}\n</tool_call>'
    sampled = renderer.encode_answer(f"Looking.\n{call}\n{call}") + ([2] if finish == "stop" else [])
    stored = joined(renderer.render(before, [BASH])) + renderer.generation_prompt.tolist() + sampled
    segments = renderer.render_tail(tail, after=finish)  # pyright: ignore[reportArgumentType]
    assert [s.message for s in segments] == tail
    assert stored + joined(segments) == joined(renderer.render([*before, answer, *tail], [BASH]))


def test_results_that_share_a_turn_still_get_a_segment_each(tmp_path: Path) -> None:
    renderer = with_template(tmp_path, QWEN_LIKE)
    renderer.check_append_only()
    assert renderer.template_name.endswith("chat_template.jinja")
    tail = [Message("tool", "one", tool_call_id="a"), Message("tool", "two", tool_call_id="b")]
    segments = renderer.render_tail(tail, after="stop")
    text = renderer.spell(joined(segments))
    expected = (
        "\n<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    )
    assert text == expected
    assert len(segments) == 2
    assert joined(renderer.render(CONVERSATION, [BASH])) == renderer.encode_answer(
        renderer._template.text(CONVERSATION, [BASH])
    )


def test_a_template_that_changes_the_past_is_refused(tmp_path: Path) -> None:
    renderer = with_template(tmp_path, CHANGES_THE_PAST)
    with pytest.raises(TemplateError, match=r"chat_template.jinja is not append-only: message \d .* from '.*' to '.*'"):
        renderer.check_append_only()


def test_a_template_that_does_not_close_turns_is_refused(tmp_path: Path) -> None:
    renderer = with_template(tmp_path, QWEN_LIKE.replace("<|im_end|>", ""))
    with pytest.raises(TemplateError, match="does not end an answer"):
        renderer.check_append_only()


def test_a_template_that_drops_a_role_is_refused(tmp_path: Path) -> None:
    dropping = QWEN_LIKE.replace("{%- else %}", "{%- elif m.role != 'system' %}")
    with pytest.raises(TemplateError, match="leaves out what role system says"):
        with_template(tmp_path, dropping).check_append_only()


def test_errors_of_the_template_name_it(tmp_path: Path) -> None:
    renderer = with_template(
        tmp_path, "{% if messages | length > 5 %}{{ raise_exception('too long') }}{% endif %}" + QWEN_LIKE
    )
    with pytest.raises(TemplateError, match=r"chat_template.jinja cannot render roles \[.*\]: too long"):
        renderer.render(CONVERSATION)
    with pytest.raises(TemplateError, match="not valid Jinja"):
        with_template(tmp_path / "second", "{% if %}")


def test_tools_without_any_template_for_them(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"))
    renderer = Renderer.from_folder(folder)
    renderer.check_append_only()
    with pytest.raises(TemplateError, match="ignores tools"):
        renderer.render(CONVERSATION[:2], [BASH])


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Renderer.from_folder(tmp_path)
    folder = make_tokenizer(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer"):
        Renderer.from_folder(folder)
    folder = make_tokenizer(tmp_path / "bare")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Renderer.from_folder(folder)


def test_stop_tokens_come_from_the_first_file_that_names_them(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert Renderer.from_folder(folder).stop_token_ids == (2, 0)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert Renderer.from_folder(folder).stop_token_ids == (2, 0)
    (folder / "config.json").unlink()
    assert Renderer.from_folder(folder).stop_token_ids == (2,)


def test_hugging_face_renders_the_same(folder: Path) -> None:
    """Our environment and transformers' agree on the ids of the shipped template and of the Qwen-like one."""
    transformers = pytest.importorskip("transformers")
    from importlib import resources

    from upspiral.rendering.chat_template import template_message, template_tool

    ours = resources.files("upspiral.rendering").joinpath("templates/chatml_tools.jinja").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [template_message(m) for m in CONVERSATION]
    theirs = tokenizer.apply_chat_template(
        messages, tools=[template_tool(BASH)], chat_template=ours, add_generation_prompt=True, return_dict=False
    )
    renderer = Renderer.from_folder(folder)
    assert joined(renderer.render(CONVERSATION, [BASH])) + renderer.generation_prompt.tolist() == list(theirs)


def test_generation_blocks_and_helpers_render() -> None:
    from upspiral.rendering.chat_template import ChatTemplate

    source = (
        "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}"
        "{% generation %}{{ {'é<': 1} | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    text = ChatTemplate(source, name="t").text([Message("user", "a"), Message("user", "b")])
    assert text == '{"é<": 1}4'
