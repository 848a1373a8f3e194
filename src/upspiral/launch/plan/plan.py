"""A plan: whether a run fits, how long a step takes, what holds it up, and which split of the devices is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from upspiral.config.combinations import num_ranks, publishes, ranks_beside
from upspiral.config.models import ParallelConfig, RunConfig, ServerConfig
from upspiral.errors import ConfigError
from upspiral.launch.plan.device import Device
from upspiral.launch.plan.duration import step_seconds
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.memory import engine_bytes, engine_devices, resting_bytes, trainer_bytes
from upspiral.launch.plan.shape import ModelShape
from upspiral.loop.devices import devices_of_servers
from upspiral.trainer.division import divided_counts

_USABLE = 0.9
"""Of a device's memory: the rest is the driver's, the allocator's and the interpreter's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`trainer` and `engine` in bytes by what they are for, `seconds` by part of a step."""

    shape: ModelShape
    config: RunConfig
    load: StepLoad
    device: Device
    ranks: int
    engines: int
    running: int
    """Sequences that an engine decodes at the same time."""
    together: bool
    """Whether engines and ranks share their devices and take turns."""
    shared: bool
    """Whether they are one process with one copy of the weights."""
    trainer: Mapping[str, float]
    engine: Mapping[str, float]
    """Of one of its devices; see `engine_devices`. Nothing when engines are elsewhere: each of those is taken for one
    device like the others, whose memory is not counted."""
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, shape: ModelShape, config: RunConfig, load: StepLoad, device: Device) -> Plan:
        ranks, engines = num_ranks(config), num_engines(config)
        elsewhere = has_engines_elsewhere(config)
        together = not elsewhere and _share_devices(config)
        shared = not publishes(config)
        trainer, engine = trainer_bytes(shape, config, load, device), dict(engine_bytes(shape, config, device))
        if shared:
            engine = {part: amount for part, amount in engine.items() if part not in ("weights", "interpreter")}
        room = engine["cache"]
        if config.engine.kind != "embedded" and not device.is_cpu:
            # A server takes what is left, and lets sequences wait that find no room in it: one must fit.
            resting = resting_bytes(trainer, config.trainer.kind)
            beside = (resting if config.engine.colocated else sum(trainer.values())) if together else 0
            left = _usable(device) - engine["weights"] - beside
            least = room / config.engine.max_running
            room = engine["cache"] = min(room, max(left, least))
        width = 2 if config.model.dtype == "bfloat16" else 4
        cached = int(room * engine_devices(config) // (load.decoded_context * shape.kv_bytes(width)))
        wanted = min(config.engine.max_running, config.agent.concurrency, ceil(load.rollouts / engines))
        running = max(1, min(wanted, cached))
        devices = engines * engine_devices(config)
        seconds = step_seconds(shape, config, load, device, engines=devices, running=running)
        engine = {} if elsewhere else engine
        return cls(shape, config, load, device, ranks, engines, running, together, shared, trainer, engine, seconds)

    @property
    def needed(self) -> Mapping[str, float]:
        """Bytes of the fullest device, by which of our processes has it."""
        trainer, engine = sum(self.trainer.values()), sum(self.engine.values())
        resting = resting_bytes(self.trainer, self.config.trainer.kind)
        if self.shared:  # what the trainer computes with and the engine's packed weights are never there together
            return {"the process": trainer + engine - min(self.engine["packed"], trainer - resting)}
        if self.device.is_cpu:
            return {"all processes on this machine": self.ranks * trainer + self.engines * engine}
        if self.together:
            if self.config.engine.colocated:
                return {"a rank and an engine": max(trainer, resting + engine)}
            return {"a rank and an engine": trainer + engine}
        return {"a rank": trainer, **({"an engine": engine} if self.engine else {})}

    @property
    def usable(self) -> float:
        return _usable(self.device)

    @property
    def fits(self) -> bool:
        return max(self.needed.values()) <= self.usable

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])

    def check(self) -> None:
        """Raises ConfigError, with what to change first, when a process cannot have the memory that it needs, or when
        ranks cannot divide the model so, or servers that share their devices need more of them."""
        if left := _indivisible(self.shape, self.config):
            tensor = (self.config.trainer.parallel or ParallelConfig()).tensor
            raise ConfigError(f"trainer.parallel.tensor = {tensor} does not divide the model's {', '.join(left)}")
        if self.together and not self.device.is_cpu and _engines_key(self.config) == "engine.server.replicas":
            devices_of_servers(self.config, [str(number) for number in range(self.ranks)])
        if self.fits:
            return
        who, needed = max(self.needed.items(), key=lambda item: item[1])
        raise ConfigError(
            f"this cannot fit: {who} would need {needed / 2**30:.1f} GB, and {self.device.name} has "
            f"{self.usable / 2**30:.1f} GB that can be used of {self.device.memory_gb:.0f}; {self._advice()}"
        )

    def _advice(self) -> str:
        better = next(iter(sorted(alternatives(self), key=lambda plan: plan.total_s)), None)
        if better is not None:
            return "it would fit with " + describe_split(better)
        trainer, key = self.trainer, max(self.trainer, key=lambda part: self.trainer[part])
        if key == "activations":
            return "lower trainer.tokens_per_microbatch, or set trainer.activation_checkpointing = true"
        if sum(self.engine.values()) > sum(trainer.values()):
            if self.config.engine.kind == "embedded":
                return "lower engine.context_length, or engine.cache_slots and engine.max_running"
            if self.device.is_cpu:
                return "lower engine.server.cache_gb"
            return (
                "lower engine.context_length, or divide an engine with --tensor-parallel-size (engine.server.arguments)"
            )
        return "add devices, or train factors alone with a section [trainer.lora]"


def _usable(device: Device) -> float:
    return _USABLE * device.memory_gb * 2**30


def num_engines(config: RunConfig) -> int:
    server = config.engine.server or ServerConfig()
    if server.urls:
        return len(server.urls)
    return config.cluster.engines if config.cluster.address is not None else server.replicas


def has_engines_elsewhere(config: RunConfig) -> bool:
    """Whether they are servers that run already, on devices that are not the ranks'."""
    return bool((config.engine.server or ServerConfig()).urls) and not config.engine.colocated


def _share_devices(config: RunConfig) -> bool:
    """Without Ray, an embedded engine is where the first rank is; servers are there with engine.colocated."""
    if config.cluster.address is not None:
        return ranks_beside(config) > 0 or config.cluster.engine_gpus + config.cluster.rank_gpus <= 1
    return config.engine.colocated or config.engine.kind == "embedded"


def _engines_key(config: RunConfig) -> str | None:
    """What says how many engines there are; None: nothing that a run could choose."""
    if config.engine.server is not None and config.engine.server.urls:
        return None
    if config.cluster.address is not None:
        return "cluster.engines"
    return None if config.engine.kind == "embedded" else "engine.server.replicas"


def alternatives(plan: Plan) -> Iterator[Plan]:
    """Splits of as many devices that fit: other ways to divide the model, and other numbers of ranks and engines."""
    if plan.device.is_cpu or plan.config.trainer.kind == "local":
        return
    for ranks, engines in _splits(plan):
        for changes in _divisions(plan.config, ranks):
            config = _changed(plan.config, ranks, engines, changes)
            other = Plan.of(plan.shape, config, plan.load, plan.device)
            if other.fits and not _indivisible(plan.shape, config):
                yield other


def _splits(plan: Plan) -> Iterator[tuple[int, int]]:
    """Numbers of ranks and engines."""
    if _engines_key(plan.config) is None:
        yield plan.ranks, plan.engines
        return
    size = engine_devices(plan.config)
    count = plan.ranks if plan.together else plan.ranks + plan.engines * size
    for ranks in {count} if plan.together else range(1, count):
        engines, rest = divmod(count if plan.together else count - ranks, size)
        if engines and not rest:
            yield ranks, engines


def better_split(plan: Plan) -> Plan | None:
    """The fastest alternative, if it saves a twentieth at least."""
    best = min(alternatives(plan), key=lambda other: other.total_s, default=None)
    return best if best is not None and best.total_s < 0.95 * plan.total_s else None


def describe_split(plan: Plan) -> str:
    parallel = plan.config.trainer.parallel or ParallelConfig()
    words = [f"trainer.parallel.ranks = {plan.ranks}"]
    if plan.config.trainer.kind == "deepspeed":
        words.append(f"trainer.parallel.zero_stage = {parallel.zero_stage}")
    else:
        words.append(f"trainer.parallel.tensor = {parallel.tensor}")
    words.append(f"trainer.activation_checkpointing = {str(plan.config.trainer.activation_checkpointing).lower()}")
    if (key := _engines_key(plan.config)) is not None:
        words.append(f"{key} = {plan.engines}")
    if ranks_beside(plan.config) and plan.config.cluster.engine_gpus:
        words.append(f"cluster.engine_gpus = {plan.config.cluster.engine_gpus:g}")
    return ", ".join(words)


def _indivisible(shape: ModelShape, config: RunConfig) -> list[str]:
    """What of the model tensor-parallel ranks cannot divide."""
    dense = not shape.experts
    counts = divided_counts(
        config.trainer.kind,
        key_heads=shape.key_heads,
        experts=shape.experts,
        inner=shape.inner if dense else 0,
        experts_inner=0 if dense else shape.inner,
    )
    tensor = (config.trainer.parallel or ParallelConfig()).tensor
    return [f"{count} {what}" for what, count in counts.items() if count % tensor]


def _divisions(config: RunConfig, ranks: int) -> Iterator[dict[str, Any]]:
    for checkpointing in (False, True):
        if config.trainer.kind == "deepspeed":
            for stage in (1, 2, 3):
                yield {"zero_stage": stage, "checkpointing": checkpointing}
        else:
            for tensor in (1, 2, 4, 8):
                if ranks % tensor == 0:
                    yield {"tensor": tensor, "checkpointing": checkpointing}


def _changed(config: RunConfig, ranks: int, engines: int, changes: dict[str, Any]) -> RunConfig:
    """Not validated again: the values are ones that the models allow."""
    parallel = config.trainer.parallel or ParallelConfig()
    checkpointing = changes.pop("checkpointing")
    trainer = config.trainer.model_copy(update={
        "parallel": parallel.model_copy(update={"ranks": ranks, "expert": 1, **changes}),
        "activation_checkpointing": checkpointing,
    })  # fmt: skip
    changed: dict[str, Any] = {"trainer": trainer}
    if _engines_key(config) == "cluster.engines":
        wanted = {"engine_gpus": float(ranks // engines)} if ranks_beside(config) and config.cluster.engine_gpus else {}
        changed["cluster"] = config.cluster.model_copy(update={"engines": engines, **wanted})
    elif _engines_key(config) == "engine.server.replicas":
        server = (config.engine.server or ServerConfig()).model_copy(update={"replicas": engines})
        changed["engine"] = config.engine.model_copy(update={"server": server})
    return config.model_copy(update=changed)
