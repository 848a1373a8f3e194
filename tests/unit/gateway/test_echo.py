"""What counts as the same message when an agent sends it back."""

from __future__ import annotations

import pytest

from upspiral.gateway.echo import canonical_json, defaults_of, message_keys
from upspiral.types import Message, ToolCall, ToolSpec

EDIT = ToolSpec(
    "edit",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "all": {"type": "boolean", "default": False},
            "limit": {"default": 0},
            "scale": {"type": "number", "default": 1.0},
            "where": {"default": {"a": [0]}},
        },
    },
)


@pytest.mark.parametrize(
    ("sent_back", "same"),
    [
        ('{"path":"a"}', True),
        ('{"all":false,"path":"a"}', True),
        ('{"limit": 0, "path": "a", "all": false}', True),
        ('{"path":"a","scale":1.0}', True),
        ('{"path":"a","scale":1}', True),
        ('{"path":"a","scale":2.0}', False),
        ('{"path":"a","where":{"a":[0.0]}}', True),
        ('{"path":"a","where":{"a":[false]}}', False),
        ('{"path":"a","all":true}', False),
        ('{"path":"a","all":0}', False),
        ('{"path":"a","limit":false}', False),
        ('{"path":"a","new":false}', False),
        ('{"all":false}', False),
    ],
)
def test_an_argument_that_equals_its_default_may_be_written_out(sent_back: str, same: bool) -> None:
    """As Claude Code does with `replace_all` of its Edit tool."""
    defaults = defaults_of([EDIT, ToolSpec("plain")])
    served, echoed = (
        message_keys([Message("assistant", tool_calls=(ToolCall(call_id, "edit", arguments),))], defaults)
        for call_id, arguments in (("1", '{"path": "a"}'), ("2", sent_back))
    )
    assert (served == echoed) is same


@pytest.mark.parametrize(
    ("served", "sent_back", "same"),
    [
        ('{"n": 1.0, "deep": [{"m": 1e3}], "o": -0.0}', '{"n":1,"deep":[{"m":1000}],"o":0}', True),
        ('{"n": 1E2}', '{"n":100.0}', True),
        ('{"n": 0.1}', '{"n":0.10}', True),
        ('{"n": 1.5}', '{"n":1}', False),
        ('{"n": 1.0}', '{"n":true}', False),
        ('{"n": 1.0}', '{"n":"1.0"}', False),
        ('{"n": 9007199254740993}', '{"n":9007199254740992}', False),
        ('{"n": 1e400}', '{"n":1e999}', True),
    ],
)
def test_a_number_may_be_written_otherwise(served: str, sent_back: str, same: bool) -> None:
    """As JavaScript does with every call that it parses and writes again."""
    assert (canonical_json(served) == canonical_json(sent_back)) is same
