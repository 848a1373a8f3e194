"""Which GPUs ranks and servers of one machine get. No GPU is needed to divide a list of them."""

from __future__ import annotations

from typing import Any

import pytest

from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError
from upspiral.loop.devices import devices_of_model, devices_of_server, devices_of_servers, visible_devices

EIGHT = ["GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e", "GPU-f", "GPU-g", "GPU-h"]


def config(ranks: int, replicas: int, *arguments: str, colocated: bool = False) -> RunConfig:
    trainer: dict[str, Any] = {"kind": "fsdp", "parallel": {"ranks": ranks}} if ranks > 1 else {}
    server = {"replicas": replicas, "arguments": arguments}
    engine = {"kind": "vllm", "colocated": colocated, "server": server}
    return RunConfig.model_validate({"agent": {"command": "true"}, "engine": engine, "trainer": trainer})


def test_servers_get_the_devices_behind_those_of_the_ranks() -> None:
    assert devices_of_servers(config(4, 2), EIGHT) == [["GPU-e"], ["GPU-f"]]
    assert devices_of_servers(config(4, 2, "--tensor-parallel-size", "2"), EIGHT) == [EIGHT[4:6], EIGHT[6:8]]
    assert devices_of_servers(config(1, 1), EIGHT) == [["GPU-b"]], "a local trainer has the first"


def test_ranks_that_torchrun_starts_have_none_of_them() -> None:
    made = config(16, 2, "-tp", "4")
    parallel = made.trainer.parallel
    assert parallel is not None
    listening = parallel.model_copy(update={"listen": "0.0.0.0:29400"})
    made = made.model_copy(update={"trainer": made.trainer.model_copy(update={"parallel": listening})})
    assert devices_of_servers(made, EIGHT) == [EIGHT[:4], EIGHT[4:]]


def test_servers_that_sleep_in_turns_get_the_ranks_own() -> None:
    assert devices_of_servers(config(4, 2, colocated=True), EIGHT) == [["GPU-a"], ["GPU-b"]]
    assert devices_of_servers(config(4, 2, "-tp", "2", colocated=True), EIGHT) == [EIGHT[:2], EIGHT[2:4]]
    assert devices_of_servers(config(1, 1, colocated=True), ["0"]) == [["0"]]


def test_no_two_have_the_same_device() -> None:
    for ranks in (1, 2, 3):
        for replicas in (1, 2, 5):
            for colocated in (False, True):
                try:
                    found = devices_of_servers(config(ranks, replicas, colocated=colocated), EIGHT)
                except ConfigError:
                    assert replicas > (ranks if colocated else len(EIGHT) - ranks)
                    continue
                own = [device for each in found for device in each]
                assert len(set(own)) == len(own) == replicas
                assert set(own) <= set(EIGHT[:ranks] if colocated else EIGHT[ranks:])


def test_too_few_devices_are_told_with_what_wants_them() -> None:
    message = r"replicas = 2 of 1 GPUs each .* beside .*ranks = 4: there are 5 GPUs; .*engine\.colocated = true"
    with pytest.raises(ConfigError, match=message):
        devices_of_servers(config(4, 2), EIGHT[:5])
    with pytest.raises(ConfigError, match=r"replicas = 3 of 2 GPUs each .* on .*ranks = 4: there are 8 GPUs"):
        devices_of_servers(config(4, 3, "-tp", "2", colocated=True), EIGHT)
    with pytest.raises(ConfigError, match=r"ranks = 4: there are 2 GPUs"):
        devices_of_servers(config(4, 1, colocated=True), EIGHT[:2])


def test_flags_say_how_many_a_server_wants() -> None:
    for given, model, server in (
        ([], 1, 1),
        (["--tensor-parallel-size=4"], 4, 4),
        (["--max-num-seqs", "2"], 1, 1),
        (["-tp", "8", "--tensor-parallel-size", "2"], 2, 2),  # the last one wins, as in vLLM
        (["-tp", "2", "--pipeline-parallel-size", "2", "--data-parallel-size", "3"], 4, 12),
    ):
        assert (devices_of_model(given), devices_of_server(given)) == (model, server), given


def test_devices_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs the [train] extra")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,7,-1,3")  # CUDA stops at the first that there is not
    assert visible_devices() == ["5", "2", "7"]
