"""What a rollout's dialects remember."""

from __future__ import annotations

from upspiral.gateway.dialects.memory import Memory


def test_the_oldest_are_forgotten_when_there_are_too_many() -> None:
    memory = Memory(most_entries=3, most_bytes=1000)
    for name in "abcd":
        memory.keep(name, name.upper(), 1)
    assert [memory.find(name) for name in "abcd"] == [None, "B", "C", "D"]


def test_the_oldest_are_forgotten_when_they_are_too_large() -> None:
    memory = Memory(most_entries=100, most_bytes=10)
    memory.keep("a", 1, 6)
    memory.keep("b", 2, 6)
    assert memory.find("a") is None and memory.find("b") == 2
    memory.keep("huge", 3, 50)
    assert kept(memory, "a", "b", "huge") == [None, None, 3], "the newest stays, or nobody could go on"
    memory.keep("c", 4, 1)
    assert kept(memory, "huge", "c") == [None, 4]


def kept(memory: Memory, *names: str) -> list[object]:
    return [memory.find(name) for name in names]


def test_keeping_again_and_forgetting_free_their_room() -> None:
    memory = Memory(most_entries=100, most_bytes=10)
    for _ in range(5):
        memory.keep("a", 1, 6)
    memory.keep("b", 2, 4)
    assert kept(memory, "a", "b") == [1, 2]
    assert memory.forget("a") and not memory.forget("a")
    memory.keep("c", 3, 6)
    assert kept(memory, "b", "c") == [2, 3]
