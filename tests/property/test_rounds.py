"""Rounds: equal kinds at every place, every pass once and in its order, nothing kept longer than by one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.forests import batches_of_rollouts
from upspiral.trainer.depth_first import lanes_of
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.rounds import Turn, turns


def dealt(items: list[Item], budgets: Sequence[int], shift: int) -> list[ForestBatch]:
    """A lane for each budget, with every so many of the rollouts. `shift`: by which the lanes' numbers are moved."""
    lanes = len(budgets)
    return [
        replace(batch, lane=number + shift)
        for number, budget in enumerate(budgets)
        for batch in pack(items[number::lanes], tokens_per_microbatch=budget)
    ]


def passes_in_plain_order(batches: Sequence[ForestBatch]) -> list[tuple[str, int]]:
    """(kind, batch by id) as one process does them."""
    order: list[tuple[str, int]] = []
    for lane in lanes_of(batches):
        for work in lane.remaining:
            kinds = ("forward", "backward") if work.kind == "both" else (work.kind,)
            order += [(kind, id(lane.batches[work.batch])) for kind in kinds]
    return order


def most_alive(order: Sequence[tuple[str, int]]) -> int:
    alive, most = 0, 0
    for kind, _ in order:
        alive += 1 if kind == "forward" else -1
        most = max(most, alive)
    return most


@settings(max_examples=200, deadline=None)
@given(
    items=batches_of_rollouts(),
    budgets=st.lists(st.sampled_from([2, 5, 12, 1000]), min_size=1, max_size=4),
    places=st.integers(1, 4),
    shift=st.integers(0, 3),
)
def test_what_ranks_begin_together_they_end_together(
    items: list[Item], budgets: list[int], places: int, shift: int
) -> None:
    batches = dealt(items, budgets, shift)
    table = [list(turns(batches, place, places)) for place in range(places)]
    kinds = [[turn.kind for turn in own] for own in table]
    assert all(own == kinds[0] for own in kinds)
    for place, own in enumerate(table):
        real = [turn for turn in own if not turn.fills]
        wanted = passes_in_plain_order([batch for batch in batches if batch.lane % places == place])
        assert [(turn.kind, id(turn.batch)) for turn in real] == wanted
    closing = closed_at(table[0])
    assert all(closed_at(own) == closing for own in table)
    # Nobody makes a round that nobody needs.
    forwards = [number for number, turn in enumerate(table[0]) if turn.kind == "forward"]
    assert all(not all(own[number].fills for own in table) for number in forwards)


def closed_at(own: Sequence[Turn]) -> dict[int, int]:
    """Of each forward turn, by its number, the number of its batch's backward turn; every one has one."""
    begun: dict[int, int] = {}
    found: dict[int, int] = {}
    for number, turn in enumerate(own):
        if turn.kind == "forward":
            begun[id(turn.batch)] = number
        else:
            found[begun.pop(id(turn.batch))] = number
    assert not begun
    return found


@settings(max_examples=50, deadline=None)
@given(items=batches_of_rollouts(), budgets=st.lists(st.sampled_from([2, 5, 12]), min_size=1, max_size=4))
def test_one_place_does_what_one_process_does(items: list[Item], budgets: list[int]) -> None:
    batches = dealt(items, budgets, 0)
    own = list(turns(batches, 0, 1))
    assert not any(turn.fills for turn in own)
    order = [(turn.kind, id(turn.batch)) for turn in own]
    assert order == passes_in_plain_order(batches)
    assert most_alive(order) == most_alive(passes_in_plain_order(batches))
