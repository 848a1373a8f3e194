"""What counts as the same message when an agent sends it back."""

from __future__ import annotations

import pytest

from upspiral.gateway.echo import EchoKeys
from upspiral.types import Message, ToolCall, ToolSpec

EDIT = ToolSpec(
    "edit",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "all": {"type": "boolean", "default": False},
            "limit": {"default": 0},
        },
    },
)


@pytest.mark.parametrize(
    ("sent_back", "same"),
    [
        ('{"path":"a"}', True),
        ('{"all":false,"path":"a"}', True),
        ('{"limit": 0, "path": "a", "all": false}', True),
        ('{"path":"a","all":true}', False),
        ('{"path":"a","all":0}', False),
        ('{"path":"a","limit":false}', False),
        ('{"path":"a","new":false}', False),
        ('{"all":false}', False),
    ],
)
def test_an_argument_that_equals_its_default_may_be_written_out(sent_back: str, same: bool) -> None:
    """As Claude Code does with `replace_all` of its Edit tool."""
    echo = EchoKeys()
    echo.offered([EDIT, ToolSpec("plain")])
    served, echoed = (
        echo.of([Message("assistant", tool_calls=(ToolCall(call_id, "edit", arguments),))])
        for call_id, arguments in (("1", '{"path": "a"}'), ("2", sent_back))
    )
    assert (served == echoed) is same
