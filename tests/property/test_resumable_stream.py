"""Whatever connections do, a resumable stream brings each byte once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.sandbox.server.resumable import UNCONFIRMED_BYTES, Resumable, ResumeError

SIDES = st.integers(0, 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), SIDES, st.binary(max_size=300_000)),
        st.tuples(st.just("send"), SIDES, st.integers(0, 3)),
        st.tuples(st.just("deliver"), SIDES, st.integers(0, 3)),
        st.tuples(st.just("break"), SIDES, st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_byte_comes_once(steps: list[tuple[str, int, bytes | int]]) -> None:
    ends = (Resumable(), Resumable())
    written, came = [b"", b""], [b"", b""]
    under_way: list[list[bytes]] = [[], []]
    """By receiving side."""

    def deliver(side: int, count: int) -> None:
        for _ in range(min(count, len(under_way[side]))):
            came[side] += ends[side].take(under_way[side].pop(0))

    def reconnect() -> None:
        under_way[0].clear()
        under_way[1].clear()
        for side in (0, 1):
            ends[side].resume(ends[1 - side].received)

    for what, side, detail in steps:
        if what == "write" and isinstance(detail, bytes):
            written[side] += detail
            ends[side].write(detail)
        elif what == "send" and isinstance(detail, int):
            for _ in range(detail):
                if ends[side].has_news:
                    under_way[1 - side].append(ends[side].next_message())
        elif what == "deliver" and isinstance(detail, int):
            deliver(side, detail)
        else:
            reconnect()
        assert written[1 - side].startswith(came[side])
    reconnect()
    while ends[0].has_news or ends[1].has_news or under_way[0] or under_way[1]:
        for side in (0, 1):
            if ends[side].has_news:
                under_way[1 - side].append(ends[side].next_message())
            deliver(side, 1)
    assert came == [written[1], written[0]]
    assert not ends[0].is_full and not ends[1].is_full


def test_what_is_kept_is_bounded_by_confirmations() -> None:
    writer, reader = Resumable(), Resumable()
    most = 0
    for _ in range(200):
        while not writer.is_full:
            writer.write(bytes(100_000))
        most = max(most, len(writer._kept))
        while writer.has_news:
            reader.take(writer.next_message())
        assert reader.has_news
        writer.take(reader.next_message())
    assert reader.received > 100 * UNCONFIRMED_BYTES and most <= UNCONFIRMED_BYTES + 100_000


@pytest.mark.parametrize("received", [-1, 6, 1 << 63])
def test_an_end_that_has_what_was_never_sent_is_refused(received: int) -> None:
    end = Resumable()
    end.write(b"12345")
    end.next_message()
    with pytest.raises(ResumeError, match="it can have 0 to 5"):
        end.resume(received)
    end.write(b"678")
    with pytest.raises(ResumeError, match="it can have 0 to 5"):
        end.take((8).to_bytes(8, "big"))
    with pytest.raises(ResumeError, match="too short"):
        end.take(b"1234567")
