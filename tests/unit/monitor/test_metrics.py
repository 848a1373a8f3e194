"""The metrics file: what is written is read, resumes supersede, crashes and full disks are survived or said."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.errors import StoreError
from upspiral.monitor.metrics import MetricsLog, read_metrics


def test_lines_come_back_in_order_with_time_and_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append("warm_start", 0, {"demonstrations": 48, "loss": np.float32(0.5)})
        log.append("step", 1, {"reward_mean": float("nan"), "masked": {"no_signal": 12}})
        log.note(1, "one group failed")
    warm, step, note = read_metrics(tmp_path)
    assert (warm["kind"], warm["step"], warm["loss"]) == ("warm_start", 0, 0.5)
    assert step["reward_mean"] is None and step["masked"] == {"no_signal": 12}
    assert note["text"] == "one group failed" and note["time"] >= warm["time"] > 1e9


def test_nothing_written_reads_as_nothing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_the_last_line_of_a_step_counts_and_evaluations_differ_by_temperature(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append("step", 1, {"loss": 1.0})
        log.append("eval", 1, {"temperature": 0.0, "success": 3})
        log.append("eval", 1, {"temperature": 1.0, "success": 2})
        log.append("step", 1, {"loss": 2.0})
        log.append("eval", 1, {"temperature": 0.0, "success": 4})
    lines = read_metrics(tmp_path)
    assert [line["loss"] for line in lines if line["kind"] == "step"] == [2.0]
    assert sorted((line["temperature"], line["success"]) for line in lines if line["kind"] == "eval") == [
        (0.0, 4),
        (1.0, 2),
    ]


@given(st.integers(1, 12), st.integers(1, 13), st.integers(0, 4))
def test_a_resume_supersedes_its_step_and_later(
    tmp_path_factory: pytest.TempPathFactory, first: int, resumed: int, more: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with MetricsLog(folder) as log:
        for step in range(1, first + 1):
            log.append("step", step, {"life": 1})
    with MetricsLog(folder) as log:
        log.resumed(resumed)
        for step in range(resumed, resumed + more):
            log.append("step", step, {"life": 2})
    steps = [(line["step"], line["life"]) for line in read_metrics(folder) if line["kind"] == "step"]
    kept = [(step, 1) for step in range(1, min(first + 1, resumed))]
    assert steps == kept + [(step, 2) for step in range(resumed, resumed + more)]


def test_a_torn_last_line_is_ignored_and_cut_off_on_reopening(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append("step", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 2, "text": "' + b"x" * 9000)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with MetricsLog(tmp_path) as log:
        log.append("step", 2, {"loss": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"note","step":0,"text":"a"}\nnot json\n')
    with pytest.raises(StoreError, match="line 2 is not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"[1]\n")
    with pytest.raises(StoreError, match="line 1 is no metrics line"):
        read_metrics(tmp_path)


def test_a_full_disk_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsLog(tmp_path) as log, pytest.raises(StoreError, match="No space left on device"):
        log.append("step", 1, {"loss": 1.0})


def test_a_missing_run_folder_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/metrics\.jsonl could not be opened"):
        MetricsLog(tmp_path / "nowhere")


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="none of warm_start"):
        log.append("steps", 1, {})  # pyright: ignore[reportArgumentType]
