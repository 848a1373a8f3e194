"""Lines of conversation: followed from where they were left, they are what they are when followed from the start."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.gateway.line import Lines
from upspiral.types import Message, ToolCall, ToolSpec

CALLS = st.lists(
    st.builds(ToolCall, st.sampled_from("ab"), st.just("t"), st.sampled_from(["{}", '{"n":1}', '{"n": 1.0}'])),
    max_size=2,
).map(tuple)
MESSAGES = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user"]), st.sampled_from(["", "x", " x"])),
    st.builds(Message, st.just("assistant"), st.sampled_from(["", "x", " x"]), st.sampled_from([None, "hm"]), CALLS),
    st.builds(lambda name: Message("tool", "r", tool_call_id=name), st.sampled_from("abc")),
)


def tool(default: int) -> ToolSpec:
    return ToolSpec("t", parameters={"type": "object", "properties": {"n": {"default": default}}})


@settings(max_examples=200, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=4), st.data())
def test_a_line_is_the_same_wherever_it_is_followed_from(messages: list[Message], data: st.DataObject) -> None:
    lines, tools = Lines(), [tool(1)]
    for _ in range(12):
        kept = messages[: data.draw(st.integers(0, len(messages)))]
        messages = [*kept, *data.draw(st.lists(MESSAGES, min_size=not kept, max_size=3))]
        tools = data.draw(st.sampled_from([tools, [tool(1)], [tool(2)]]))
        lines.offered(tools)
        found, slow = lines.follow(messages), Lines()
        slow.offered(tools)
        whole = slow.follow(messages)
        assert (found.messages, found.keys, found.ids, found.thoughts) == (
            whole.messages, whole.keys, whole.ids, whole.thoughts,
        )  # fmt: skip


def test_an_answer_is_keyed_with_the_tools_that_it_was_asked_for_with() -> None:
    lines = Lines()
    asked = [Message("user", "go")]
    answer = Message("assistant", tool_calls=(ToolCall("a", "t", '{"n":1}'),))
    lines.offered([tool(1)])
    line = lines.follow(asked)
    lines.offered([tool(2)])
    _, answered = line.going_on(answer)
    lines.offered([tool(1)])
    assert lines.follow([*asked, answer]).ids[-1] == answered


def test_nothing_is_kept_of_lines_that_nobody_goes_on_with() -> None:
    """An agent may count the tokens of a thousand files."""
    lines = Lines()
    for number in range(20):
        lines.follow([Message("user", f"{number}" + "x" * 100_000)])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(100):
        lines.follow([Message("user", f"{number}" + "y" * 100_000)])
    assert tracemalloc.get_traced_memory()[0] - before < 2_000_000
    tracemalloc.stop()
