"""Which GPUs of this machine the servers of a run get, beside those of its ranks. Needs no torch to be imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

from upspiral.config.combinations import num_ranks
from upspiral.config.models import RunConfig, ServerConfig
from upspiral.errors import ConfigError

_TENSOR = ("--tensor-parallel-size", "-tp", "--tp-size")
_PIPELINE = ("--pipeline-parallel-size", "-pp")
_COPIES = ("--data-parallel-size", "-dp")


def visible_devices() -> list[str]:
    """The names, for CUDA, of the GPUs that this process sees, in torch's order."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def devices_of_servers(config: RunConfig, devices: Sequence[str]) -> list[Sequence[str]]:
    """Those of `devices` that each server gets which is started on this machine. Ranks have the first ones, a local
    trainer the very first; servers the next ones, or with engine.colocated those of the ranks, in their order. Where
    ranks are that torchrun starts (trainer.parallel.listen) nobody here knows: servers have all of `devices`. Raises
    ConfigError when there are too few."""
    server, ranks = config.engine.server or ServerConfig(), num_ranks(config)
    size, advice = devices_of_server(server.arguments), "lower one of them"
    if config.trainer.parallel is not None and config.trainer.parallel.listen is not None:
        free, where = devices, ""
    elif config.engine.colocated:
        free, where = devices[:ranks], f" on those of trainer.parallel.ranks = {ranks}"
    else:
        free, where = devices[ranks:], f" beside those of trainer.parallel.ranks = {ranks}"
        advice += ", or set engine.colocated = true"
    if len(free) < server.replicas * size or (where and len(devices) < ranks):
        raise ConfigError(
            f"engine.server.replicas = {server.replicas} of {size} GPUs each have no room{where}: there are "
            f"{len(devices)} GPUs; {advice}"
        )
    return [free[number * size : (number + 1) * size] for number in range(server.replicas)]


def devices_of_server(arguments: Sequence[str]) -> int:
    """How many it computes on, by its flags."""
    return devices_of_model(arguments) * _number(arguments, _COPIES)


def devices_of_model(arguments: Sequence[str]) -> int:
    """Among how many a server divides one copy of the model."""
    return _number(arguments, _TENSOR) * _number(arguments, _PIPELINE)


def _number(arguments: Sequence[str], names: Sequence[str]) -> int:
    words = [part for argument in arguments for part in argument.split("=", 1)]
    found = [int(value) for word, value in pairwise(words) if word in names and value.isdecimal()]
    return max(1, found[-1]) if found else 1
