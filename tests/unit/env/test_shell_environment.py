"""The shell environment: determinism, honest truths, and a held-out split that shares nothing with training."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import cast

import pytest

from upspiral.config.models import EnvConfig
from upspiral.env.base import Task
from upspiral.env.registry import make_environment
from upspiral.env.shell.edits import EDITS
from upspiral.env.shell.environment import ShellEnvironment
from upspiral.env.shell.kind import Kind
from upspiral.env.shell.questions import QUESTIONS
from upspiral.env.shell.vocabulary import BY_SPLIT, HELDOUT, TRAIN, Form, Vocabulary
from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.fake import FakeBackend, Faults
from upspiral.sandbox.namespace import NamespaceBackend

ALL_LEVELS = ShellEnvironment(EnvConfig(levels=(1, 2, 3, 4)))
KINDS: tuple[Kind, ...] = (*QUESTIONS, *EDITS)
SPLITS = ("train", "heldout")


def some_tasks(split: str, count: int = 400) -> list[Task]:
    return [ALL_LEVELS.task(split, index) for index in range(count)]


async def play(sandbox: Sandbox, task: Task) -> tuple[str, str]:
    """Runs the oracle. Returns all that its commands printed, and its answer."""
    printed, answer = [], ""
    for turn in ALL_LEVELS.demonstrate(task):
        if turn.command is None:
            answer = turn.answer
            continue
        done = await sandbox.exec(turn.command, timeout_s=60)
        assert (done.stderr, done.timed_out) == (b"", False), (task, done)
        printed.append(done.stdout.decode())
    return " ".join(printed), answer


async def check_oracle(backend: NamespaceBackend, task: Task) -> None:
    async with backend.acquire(SandboxSpec(files=task.files)) as sandbox:
        untouched = await ALL_LEVELS.verify(task, task.truth["answer"], sandbox)
        assert untouched == (0.0 if task.truth["after"] else 1.0), task
        printed, answer = await play(sandbox, task)
        if answer != "done":
            assert set(answer.split()) <= set(re.split(r"[\s:,]+", printed)), (task, printed)
        assert await ALL_LEVELS.verify(task, f"  {answer}\n", sandbox) == 1.0, task
        for wrong in ("", "wrong", f"{answer} {answer}", answer[:-1], f"{answer}."):
            assert await ALL_LEVELS.verify(task, wrong, sandbox) == 0.0, (task, wrong)


@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_earns_the_reward_in_the_real_sandbox(split: str) -> None:
    async def check() -> None:
        backend = NamespaceBackend()
        tasks = some_tasks(split, 160)
        for start in range(0, len(tasks), 16):
            await asyncio.gather(*(check_oracle(backend, task) for task in tasks[start : start + 16]))
        await backend.stop()

    asyncio.run(check())


def test_damage_to_other_files_costs_the_reward() -> None:
    async def check() -> None:
        task = next(task for task in some_tasks("train") if task.kind == "pointer_edit")
        backend = NamespaceBackend()
        async with backend.acquire(SandboxSpec(files=task.files)) as sandbox:
            await play(sandbox, task)
            assert await ALL_LEVELS.verify(task, "done", sandbox) == 1.0
            bystander = next(
                path for path, text in task.truth["after"].items() if text == task.files.get(path, b"").decode()
            )
            await sandbox.exec(f"ln -sf /etc/passwd {bystander}", timeout_s=60)
            assert await ALL_LEVELS.verify(task, "done", sandbox) == 0.0
        await backend.stop()

    asyncio.run(check())


def test_a_broken_sandbox_is_no_reward() -> None:
    async def check() -> None:
        task = next(task for task in some_tasks("train") if task.kind == "replace")
        async with FakeBackend(faults=Faults(break_at=0)).acquire(SandboxSpec(files=task.files)) as sandbox:
            with pytest.raises(SandboxError):
                await sandbox.exec("true", timeout_s=1)
            with pytest.raises(SandboxError):
                await ALL_LEVELS.verify(task, "done", sandbox)

    asyncio.run(check())


def test_tasks_are_made_from_seed_split_and_index() -> None:
    again = make_environment(EnvConfig(levels=(1, 2, 3, 4)))
    other = make_environment(EnvConfig(levels=(1, 2, 3, 4), seed=1))
    assert [again.task("train", index) for index in (7, 3, 7)] == [
        ALL_LEVELS.task("train", index) for index in (7, 3, 7)
    ]
    assert all(other.task("train", index) != ALL_LEVELS.task("train", index) for index in range(20))
    assert len({task.instruction for task in some_tasks("train")}) > 390
    assert len({task.id for split in SPLITS for task in some_tasks(split)}) == 800


def test_levels_choose_the_rungs() -> None:
    assert {task.difficulty for task in some_tasks("train")} == {1, 2, 3, 4}
    only_two = ShellEnvironment(EnvConfig(levels=(2,)))
    assert {only_two.task("heldout", index).difficulty for index in range(50)} == {2}
    default = ShellEnvironment(EnvConfig())
    counts = Counter(default.task("heldout", index).difficulty for index in range(200))
    assert counts == {1: 80, 2: 70, 3: 50}
    with pytest.raises(ConfigError, match=r"env\.levels = \[5\]"):
        ShellEnvironment(EnvConfig(levels=(5,)))
    with pytest.raises(ConfigError, match="no split 'test'"):
        default.task("test", 0)


@pytest.mark.parametrize("split", SPLITS)
def test_difficulty_is_the_number_of_calls_of_the_oracle(split: str) -> None:
    for task in some_tasks(split):
        turns = ALL_LEVELS.demonstrate(task)
        assert [turn.command is None for turn in turns] == [False] * task.difficulty + [True]
        assert turns[-1].answer == task.truth["answer"]


def test_there_are_many_kinds_each_with_its_own_phrasings() -> None:
    assert len(KINDS) >= 28
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert len(set(kind.train)) >= 4, kind.name
        assert len(set(kind.heldout)) >= 2, kind.name
        assert not set(kind.train) & set(kind.heldout), kind.name
    seen = {task.kind for task in (ShellEnvironment(EnvConfig(levels=(1,))).task("train", i) for i in range(600))}
    assert seen == {kind.name for kind in KINDS}


def everything_in(vocabulary: Vocabulary) -> set[str]:
    extensions = {extension for form in Form for extension in vocabulary.extensions[form]}
    return {*vocabulary.words, *vocabulary.stems, *vocabulary.folders, *vocabulary.keys, *extensions}


def test_the_splits_share_no_words_names_or_layouts() -> None:
    assert not everything_in(TRAIN) & everything_in(HELDOUT)
    assert TRAIN.depths != HELDOUT.depths
    train, heldout = ("\n".join(task.instruction for task in some_tasks(split)) for split in SPLITS)
    for vocabulary, other in ((TRAIN, heldout), (HELDOUT, train)):
        names = {f"{stem}.{extension}" for stem in vocabulary.stems for extension in everything_in(vocabulary)}
        assert not names & set(re.findall(r"\w+\.\w+", other))


@pytest.mark.parametrize("vocabulary", BY_SPLIT.values())
def test_no_word_hides_in_another(vocabulary: Vocabulary) -> None:
    """So that grep finds what the truth counts."""
    in_lines = [*vocabulary.words, *vocabulary.keys]
    assert not [(a, b) for a in in_lines for b in in_lines if a != b and a in b]
    extensions = vocabulary.extensions[Form.FOLDER]
    assert not [(a, b) for a in extensions for b in (*vocabulary.stems, *extensions) if a != b and a in b]


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_small_and_instructions_short(split: str) -> None:
    for task in some_tasks(split):
        assert len(task.instruction.split()) <= 60, task.instruction
        assert len(task.truth["answer"].split()) <= task.difficulty
        assert all(len(content.splitlines()) <= 12 for content in task.files.values())


@pytest.mark.parametrize("split", SPLITS)
def test_composed_tasks_cannot_be_guessed(split: str) -> None:
    """What a pointer hides is not said, and no constant answer is often right where no file has to change."""
    composed = [task for task in some_tasks(split) if task.difficulty >= 2]
    for task in composed:
        if task.kind.startswith(("pointer", "chain")):
            last_read = [c for c in task.truth["commands"] if c.startswith("cat ")][-1].removeprefix("cat ")
            assert task.files[last_read].decode().strip() not in task.instruction
    answers = Counter(cast(str, task.truth["answer"]) for task in composed if not task.truth["after"])
    assert answers.most_common(1)[0][1] <= 0.08 * answers.total()
