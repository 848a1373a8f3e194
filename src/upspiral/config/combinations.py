"""Values that are each valid and cannot work, or do nothing, together (DESIGN law 10)."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from upspiral.config.models import ClusterConfig, ParallelConfig, RunConfig

SERVERS = ("vllm", "sglang")
"""Values of engine.kind whose engines are servers."""


def switched_off(config: RunConfig) -> dict[str, str]:
    """Keys that this run never reads, each with the reason."""
    off: dict[str, str] = {}
    if config.warm_start.demonstrations == 0:
        for name in ("epochs", "batch_size", "lr"):
            off[f"warm_start.{name}"] = (
                "warm_start.demonstrations = 0 switches the warm start off; set it or drop this key"
            )
    if config.eval.tasks == 0:
        for name in ("every", "temperature"):
            off[f"eval.{name}"] = "eval.tasks = 0 switches evaluation off; set it or drop this key"
    if config.env.kind != "shell":
        for name in ("levels", "kinds", "shapes"):
            off[f"env.{name}"] = 'only env.kind = "shell" has a ladder; drop this key'
    off |= _of_other_engines(config) | _of_other_trainers(config)
    if config.model.dtype == "float32":
        off["trainer.master_weights"] = 'with model.dtype = "float32" weights are their own masters; drop this key'
    elif config.trainer.lora is not None:
        off["trainer.master_weights"] = "the factors of [trainer.lora] are always float32; drop this key"
    if config.sandbox.backend != "process":
        off["sandbox.trust_commands"] = 'it is about sandbox.backend = "process" only; drop this key'
    if config.agent.file is None:
        off["agent.workers"] = "only agent.file has worker processes; drop this key"
    return off


def _of_other_engines(config: RunConfig) -> dict[str, str]:
    kind, off = config.engine.kind, dict[str, str]()
    server = ("urls", "replicas", "python", "arguments", "cache_gb", "start_timeout_s")
    if kind not in SERVERS:
        off |= {f"engine.server.{name}": f'engine.kind = "{kind}" has no servers; drop this key' for name in server}
    else:
        for name in ("cache_slots", "prefill_tokens", "exact"):
            off[f"engine.{name}"] = f'engine.kind = "{kind}" decides that itself; drop this key'
        if config.engine.server is not None and config.engine.server.urls:
            for name in server[1:]:
                off[f"engine.server.{name}"] = "the servers of engine.server.urls run already; drop this key"
    if config.cluster.address is None:
        for name in set(ClusterConfig.model_fields) - {"address"}:
            off[f"cluster.{name}"] = "without cluster.address, or --on, Ray is not used; drop this key"
    if not publishes(config):
        off["engine.colocated"] = "engine and trainer share one copy of the weights and take turns; drop this key"
        for name in ("form", "transport"):
            off[f"weights.{name}"] = "engine and trainer share their weights in this process; drop this key"
    return off


def _of_other_trainers(config: RunConfig) -> dict[str, str]:
    kind = config.trainer.kind
    used = {
        "local": (),
        "fsdp": ("ranks", "listen", "tensor", "expert"),
        "deepspeed": ("ranks", "listen", "zero_stage"),
        "megatron": ("ranks", "listen", "tensor"),
    }[kind]
    off = {
        f"trainer.parallel.{name}": f'trainer.kind = "{kind}" does not divide a model so; drop this key'
        for name in ParallelConfig.model_fields
        if name not in used
    }
    if config.cluster.address is not None:
        off["trainer.parallel.listen"] = "with cluster.address, or --on, Ray starts the ranks; drop this key"
    return off


def publishes(config: RunConfig) -> bool:
    """Whether the engine gets its weights by publication."""
    together = config.engine.kind == "embedded" and config.trainer.kind == "local" and config.cluster.address is None
    return not together


def ranks_beside(config: RunConfig) -> int:
    """How many ranks take turns with each engine that Ray places, on its node and its GPUs; 0: engines and ranks are
    placed without regard to each other."""
    server = config.engine.server
    apart = config.trainer.kind == "local" or (server is not None and bool(server.urls))
    if not config.engine.colocated or config.cluster.address is None or apart:
        return 0
    return num_ranks(config) // config.cluster.engines


def num_ranks(config: RunConfig) -> int:
    """Processes of the trainer."""
    return config.trainer.parallel.ranks if config.trainer.parallel is not None else 1


def contradictions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Pairs of a key and why its value cannot work with the others."""
    algorithm, trainer, steps = config.algorithm, config.trainer, config.steps
    if config.engine.kind == "scripted":
        yield "engine.kind", 'a scripted engine has no weights, so there is nothing to learn; use "embedded" here'
    cluster = config.cluster
    yield from _of_colocated(config)
    urls = config.engine.server.urls if config.engine.server is not None else ()
    if urls and cluster.engines > 1:
        yield (
            "cluster.engines",
            f"each of {cluster.engines} actors would route to the same servers of engine.server.urls and switch their "
            "weights; set it to 1",
        )
    if trainer.parallel is not None and trainer.parallel.listen is not None and config.weights.transport == "shared":
        yield (
            "weights.transport",
            "the first rank publishes, and with trainer.parallel.listen it may be on another machine, whose memory the "
            'engines do not share; use "disk"',
        )
    if trainer.kind != "local" and trainer.lora is not None:
        yield "trainer.lora", f'trainer.kind = "{trainer.kind}" trains whole weights; drop the section or use "local"'
    if trainer.kind != "local" and trainer.master_weights == "none":
        yield "trainer.master_weights", f'trainer.kind = "{trainer.kind}" keeps float32 weights; drop this key'
    if trainer.minibatches > algorithm.groups_per_step:
        limit = algorithm.groups_per_step
        yield (
            "trainer.minibatches",
            f"more than algorithm.groups_per_step = {limit}; groups are not split, so set at most {limit}",
        )
    if trainer.lr_warmup_steps > steps:
        yield (
            "trainer.lr_warmup_steps",
            f"more than steps = {steps}, so the run never reaches trainer.lr; set at most {steps}",
        )
    key, gpus = ("engine_gpus", cluster.engine_gpus) if ranks_beside(config) else ("rank_gpus", cluster.rank_gpus)
    if config.model.device == "cuda" and cluster.address is not None and not gpus:
        yield (
            "model.device",
            f'the trainer has no GPU of the cluster with cluster.{key} = 0; set that to 1, or this to "cpu"',
        )
    if config.eval.every > steps:
        yield "eval.every", f"more than steps = {steps}, so it never happens; set at most {steps}, or 0"
    if cluster.sandbox_hosts and config.agent.file is None:
        yield (
            "cluster.sandbox_hosts",
            "an agent inside its sandbox asks the gateway through a socket of the run's machine, which sandboxes of "
            "other nodes cannot have; set 0, or use agent.file, whose tools can be anywhere",
        )
    if config.agent.max_completion_tokens >= config.engine.context_length:
        yield (
            "agent.max_completion_tokens",
            f"leaves no room for a prompt in engine.context_length = {config.engine.context_length}",
        )


def _of_colocated(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What Ray cannot place on the same devices. Servers of engine.server.urls are not placed by Ray."""
    cluster, server, ranks = config.cluster, config.engine.server, num_ranks(config)
    if not config.engine.colocated or cluster.address is None or (server is not None and server.urls):
        return
    engines, beside = cluster.engines, ranks_beside(config)
    if config.trainer.kind == "local":
        if cluster.engine_gpus:
            yield (
                "engine.colocated",
                'trainer.kind = "local" trains in the process of the run, which has no GPU of the cluster; use "fsdp" '
                f"with trainer.parallel.ranks = {ceil(engines * cluster.engine_gpus)}",
            )
    elif ranks % engines:
        yield (
            "engine.colocated",
            f"trainer.parallel.ranks = {ranks} cannot be divided among cluster.engines = {engines}: each engine takes "
            "turns with as many ranks; change one of them",
        )
    elif cluster.rank_gpus:
        yield (
            "cluster.rank_gpus",
            "with engine.colocated, ranks compute on the GPUs of their engines, of which cluster.engine_gpus says how "
            "many each has; drop this key",
        )
    elif cluster.engine_gpus not in (0, beside):
        yield (
            "cluster.engine_gpus",
            f"with engine.colocated, each of cluster.engines = {engines} takes turns with {beside} of "
            f"trainer.parallel.ranks = {ranks}, and every rank wants a GPU; set {beside}, or so many ranks that each "
            "GPU of an engine has one",
        )
