"""The curriculum takes tasks that are neither always nor never solved, and chooses the same again after a restart."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from upspiral.env.base import Task
from upspiral.loop.curriculum import Curriculum

KINDS = ("easy", "middling", "hopeless")
GROUP = 8


def task(index: int) -> Task:
    kind = KINDS[index % len(KINDS)]
    return Task(id=f"t{index}", split="train", kind=kind, difficulty=1, instruction="")


def curriculum(candidates: int, seed: int = 0) -> Curriculum:
    return Curriculum(task, seed=seed, tasks_per_step=12, candidates=candidates)


def rewards(chosen: Task) -> list[float]:
    return {"easy": [1.0] * GROUP, "middling": [1.0, 0.0] * (GROUP // 2), "hopeless": [0.0] * GROUP}[chosen.kind]


def play(subject: Curriculum, steps: range) -> list[list[Task]]:
    played = []
    for step in steps:
        chosen = subject.choose(step)
        subject.observe((one, rewards(one)) for one in chosen)
        played.append(chosen)
    return played


def test_kinds_with_signal_are_preferred_and_the_others_come_back() -> None:
    played = play(curriculum(candidates=4), range(1, 31))
    counts = Counter(one.kind for step in played for one in step)
    assert counts["middling"] > 0.6 * sum(counts.values())
    last = Counter(one.kind for step in played[-15:] for one in step)
    assert last["easy"] > 0 and last["hopeless"] > 0


def test_no_task_is_taken_twice() -> None:
    ids = [one.id for step in play(curriculum(candidates=3), range(1, 20)) for one in step]
    assert len(ids) == len(set(ids))


def test_one_candidate_takes_the_tasks_in_order() -> None:
    numbers = [int(one.id[1:]) for step in play(curriculum(candidates=1), range(1, 5)) for one in step]
    assert all(after == before + 1 for before, after in pairwise(numbers))


def test_a_restart_that_is_told_the_past_chooses_the_same() -> None:
    whole = play(curriculum(candidates=4), range(1, 9))
    resumed = curriculum(candidates=4)
    for step in range(1, 5):
        resumed.observe((one, rewards(one)) for one in resumed.choose(step))
    assert [[one.id for one in step] for step in play(resumed, range(5, 9))] == [
        [one.id for one in step] for step in whole[4:]
    ]


def test_the_expected_signal_of_a_kind() -> None:
    subject = curriculum(candidates=1)
    assert subject.expected_signal("never seen") == 0.5
    subject.observe((task(index), rewards(task(index))) for index in range(30))
    assert subject.expected_signal("easy") < 0.1
    assert subject.expected_signal("hopeless") < 0.1
    assert subject.expected_signal("middling") > 0.9


def test_a_kind_of_sure_successes_and_sure_failures_has_no_signal() -> None:
    subject = curriculum(candidates=1)
    subject.observe((task(0), [float(index % 2)] * GROUP) for index in range(20))
    assert subject.expected_signal("easy") < 0.1
