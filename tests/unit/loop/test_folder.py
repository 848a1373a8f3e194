"""A run folder is resumed with its own config; what may differ are keys that change nothing about what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from upspiral.config.models import ModelConfig, RunConfig
from upspiral.errors import ConfigError, ModelError
from upspiral.loop.folder import RunFolder
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress


def config(kind: str, parallel: dict[str, Any] | None, **trainer: Any) -> RunConfig:
    division = {} if parallel is None else {"parallel": parallel}
    return RunConfig.model_validate({"agent": {"command": "true"}, "trainer": {"kind": kind, **division, **trainer}})


def opened(path: Path, now: RunConfig, *, resume: bool) -> None:
    folder = RunFolder.open(path, now, resume=resume)
    folder.begin(now)
    folder.close()


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("fsdp", {"ranks": 2}, {"ranks": 4, "tensor": 2}),
        ("fsdp", {"ranks": 4, "expert": 2}, None),
        ("megatron", {"ranks": 2, "tensor": 2}, {"ranks": 3}),
        ("deepspeed", {"ranks": 2}, {"ranks": 2, "listen": "head:29400"}),
    ],
)
def test_ranks_may_be_started_otherwise_and_divide_otherwise_where_checkpoints_reshard(
    tmp_path: Path, kind: str, before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    opened(tmp_path, config(kind, before), resume=False)
    opened(tmp_path, config(kind, after), resume=True)
    opened(tmp_path, config(kind, before), resume=True)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            config("deepspeed", {"ranks": 2}), config("deepspeed", {"ranks": 4}),
            r"trainer.parallel.ranks was 2, is 4 \(trainer.kind = 'deepspeed' reads only checkpoints of its own",
        ),
        (
            config("deepspeed", {"ranks": 2}), config("deepspeed", {"ranks": 2, "zero_stage": 3}),
            "trainer.parallel.zero_stage was 2, is 3",
        ),
        (config("fsdp", {"ranks": 2}), config("megatron", {"ranks": 2}), "trainer.kind was 'fsdp', is 'megatron'"),
        (config("local", None), config("local", None, lora={"rank": 2}), "trainer.lora.rank was None, is 2"),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_its_keys(tmp_path: Path, before: RunConfig, after: RunConfig, says: str) -> None:
    opened(tmp_path, before, resume=False)
    with pytest.raises(ConfigError, match=says):
        opened(tmp_path, after, resume=True)
    opened(tmp_path, before, resume=True)


def test_a_run_that_could_not_start_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    mistyped = config("local", None).model_copy(update={"model": ModelConfig(path="no-such-model")})
    for _ in range(2):
        with pytest.raises(ModelError, match="no-such-model"):
            run_training(mistyped, tmp_path, resume=False, progress=LiveProgress("mistyped", 1))
    with pytest.raises(ConfigError, match="holds no run"):
        opened(tmp_path, mistyped, resume=True)
