"""The run file as types. Frozen; unknown keys are errors; every key has a meaning and says it.

One TOML file is one run. `upspiral run FILE --trainer.lr 2e-5` overrides a key.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(_Section):
    """Which model learns."""

    path: str = "smollm2-135m"
    """A name from `upspiral model list`, a local Hugging Face folder, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the weights in the forward and backward pass. What the optimizer keeps beside them is
    trainer.master_weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads for the model; 0 means one per core."""


class ServerConfig(_Section):
    """The inference servers of engine.kind "vllm" and "sglang"."""

    urls: tuple[str, ...] = ()
    """Servers that run already, such as "http://node7:8000"; none named: `replicas` are started on this machine."""
    replicas: PositiveInt = 1
    """How many servers are started."""
    python: str | None = None
    """The interpreter of the environment that has the server's packages; unset: that of `upspiral engine install`."""
    arguments: tuple[str, ...] = ()
    """Further flags for each server that is started, such as "--tensor-parallel-size", "2"."""
    cache_gb: PositiveFloat = 2.0
    """Memory for keys and values of each server that is started on a CPU."""
    start_timeout_s: PositiveFloat = 600.0
    """Deadline for a server to load the model and answer."""


class EngineConfig(_Section):
    """Where tokens are sampled."""

    kind: Literal["embedded", "vllm", "sglang", "scripted"] = "embedded"
    """"embedded" samples in this process; "vllm" and "sglang" are servers, to which each step's weights are published;
    "scripted" plays a file, for tests and debugging."""
    server: ServerConfig | None = None
    """With a section [engine.server]: which servers, for "vllm" and "sglang"."""
    colocated: bool = False
    """Whether engine and trainer share their devices: while the trainer computes, the engine sleeps, without the memory
    of its weights and its cache."""
    max_running: PositiveInt = 64
    """How many requests decode at the same time."""
    cache_slots: PositiveInt = 128
    """How many sequences the prefix cache holds, running ones included."""
    context_length: PositiveInt = 1024
    """The most tokens a prompt plus its completion may have."""
    prefill_tokens: PositiveInt = 512
    """How many prompt tokens one engine step computes at most."""
    exact: bool = False
    """Whether the embedded engine gives a token the same bits in any company, and the local trainer those same bits.
    Slower."""
    routes: Literal["free", "replay"] = "free"
    """For models with experts. "free": in the trainer, the router chooses again; "replay": each token goes to the
    experts that computed it in the engine."""

    @model_validator(mode="after")
    def _slots_hold_the_running(self) -> EngineConfig:
        if self.kind == "embedded" and self.cache_slots < self.max_running:
            raise ValueError(
                f"engine.cache_slots = {self.cache_slots} is less than engine.max_running = {self.max_running}; "
                "every running request needs a slot"
            )
        return self


class EnvConfig(_Section):
    """What is to be learned."""

    kind: Literal["shell", "python"] = "shell"
    """"shell": generated questions about files, answered with shell commands; "python": your own, from `file`."""
    file: str | None = None
    """For "python": a file with `make_environment(seed)`; a path relative to the run file."""
    seed: int = 0
    """Tasks are generated from it."""
    levels: tuple[PositiveInt, ...] = (1, 2, 3)
    """For "shell": which rungs of the difficulty ladder appear, by the number of tool calls that the oracle needs."""
    kinds: tuple[str, ...] = ()
    """For "shell": which questions and edits appear, by name; none named: all."""
    shapes: tuple[str, ...] = ()
    """For "shell": how questions and edits are composed into tasks, by name; none named: all."""
    command_timeout_s: PositiveFloat = 10.0
    """Deadline of one command in the sandbox."""

    @model_validator(mode="after")
    def _file_fits_the_kind(self) -> EnvConfig:
        if (self.kind == "python") != (self.file is not None):
            raise ValueError('env.file belongs to env.kind = "python": set both or neither')
        return self


class SandboxConfig(_Section):
    """Where tools act, and agents that are no file."""

    backend: Literal["namespace", "process", "docker", "podman", "remote"] = "namespace"
    """What makes the sandboxes; `upspiral doctor` says which of them this machine can have."""
    url: str | None = None
    """For "remote": the address of an `upspiral sandbox serve`. The token is in the environment variable
    UPSPIRAL_SANDBOX_TOKEN."""
    image: str = "host"
    """What a sandbox begins with: a name or digest from `upspiral image list` (for "docker" and "podman": an image of
    theirs), or "host", the programs of this machine, read-only."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that can be reached from inside, such as "pypi.org" or ".example.org:443"; none named: no network. Every
    connection is written to egress.jsonl in the run folder, with the rollout's id."""
    trust_commands: bool = False
    """For "process", which keeps nobody from your network and your processes: true says that what this model runs may
    have them."""

    @model_validator(mode="after")
    def _backend_has_what_it_needs(self) -> SandboxConfig:
        if (self.backend == "remote") != (self.url is not None):
            raise ValueError('sandbox.url belongs to sandbox.backend = "remote": set both or neither')
        if self.backend == "process" and not self.trust_commands:
            raise ValueError(
                'sandbox.backend = "process" leaves your network and your processes open to what a model runs; say '
                "sandbox.trust_commands = true if it may have them, or choose another backend (`upspiral doctor`)"
            )
        return self


AgentKind = Literal[
    "claude-code",
    "codex",
    "opencode",
    "qwen-code",
    "mini-swe-agent",
    "smolagents",
    "openai-agents",
    "pydantic-ai",
    "langgraph",
]


class AgentConfig(_Section):
    """The program that acts. Exactly one of `file`, `command` and `kind`."""

    file: str | None = None
    """A Python file with `async def agent(task)`; a path relative to the run file."""
    command: str | None = None
    """A command line started inside the sandbox instead."""
    kind: AgentKind | None = None
    """An agent from `upspiral agent list`, started unmodified inside the sandbox instead."""
    workers: PositiveInt = 1
    """Warm worker processes for `file`."""
    concurrency: PositiveInt = 64
    """Rollouts in flight at once, over all workers."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of one rollout."""
    max_completion_tokens: PositiveInt = 128
    """The most tokens of one answer of the model; a smaller limit that the agent sends wins."""
    max_calls: PositiveInt = 12
    """Model calls after which a rollout is truncated."""

    @model_validator(mode="after")
    def _one_agent(self) -> AgentConfig:
        given = [f"agent.{name}" for name in ("file", "command", "kind") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"set exactly one of agent.file, agent.command and agent.kind; {found} is set")
        return self


class AuxiliaryRule(_Section):
    """Tells side calls of an agent (titles, probes, summaries by another model) by what they ask. Every condition that
    is given must hold."""

    name: str
    """Shown beside the calls that the rule told."""
    model: str | None = None
    """The model that the agent asked for matches this pattern; * stands for any text."""
    system: str | None = None
    """The system prompt contains this text."""
    max_tokens: PositiveInt | None = None
    """The agent asked for at most so many tokens."""
    tools: bool | None = None
    """Whether the call offers tools."""

    @model_validator(mode="after")
    def _some_condition(self) -> AuxiliaryRule:
        if all(value is None for value in (self.model, self.system, self.max_tokens, self.tools)):
            raise ValueError(f"rule {self.name!r} would take every call for a side call; give it a condition")
        return self


class GatewayConfig(_Section):
    """How agents are answered."""

    thinking: Literal["preserve", "template"] = "preserve"
    """Thinking in earlier answers: "preserve" keeps every token that was sampled; "template" lets the chat template
    drop it, which forks the conversation wherever it does."""
    auxiliary: tuple[AuxiliaryRule, ...] = (
        AuxiliaryRule(name="side-model", model="*-auxiliary"),
        AuxiliaryRule(name="probe", max_tokens=1),
    )
    """Calls that are answered and recorded, but never trained."""


class WarmStartConfig(_Section):
    """Supervised fine-tuning on oracle demonstrations before RL. `demonstrations = 0` switches it off."""

    demonstrations: Annotated[int, Field(ge=0)] = 0
    """How many oracle demonstrations are shown."""
    epochs: PositiveInt = 1
    """How often each is shown."""
    batch_size: PositiveInt = 8
    """Demonstrations per optimizer step."""
    lr: PositiveFloat = 1e-4
    """Learning rate at the start; it falls linearly to a tenth."""


class AlgorithmConfig(_Section):
    """How rewards become a loss."""

    kind: Literal["grpo"] = "grpo"
    """"grpo": advantage = reward minus the mean of the group, clipped policy-gradient loss."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts per task."""
    groups_per_step: PositiveInt = 8
    """Groups with signal that a step wants."""
    max_groups_per_step: PositiveInt = 16
    """Active sampling: groups without signal are replaced until `groups_per_step` have some, or this many ran."""
    task_candidates: PositiveInt = 1
    """Each group's task is drawn from this many, those more likely whose kind gave groups with signal lately; with 1
    the tasks come in order."""
    normalize_std: bool = False
    """Divide the advantage by the standard deviation of the group."""
    clip_low: Fraction = 0.2
    """The policy ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """The policy ratio is clipped above at 1 + clip_high."""
    mismatch_cap: PositiveFloat = 2.0
    """The engine-mismatch ratio p_old/q is truncated here (truncated importance sampling)."""

    @model_validator(mode="after")
    def _cap_holds_the_wanted(self) -> AlgorithmConfig:
        if self.max_groups_per_step < self.groups_per_step:
            raise ValueError(
                f"algorithm.max_groups_per_step = {self.max_groups_per_step} is less than "
                f"algorithm.groups_per_step = {self.groups_per_step}"
            )
        return self


class LoraConfig(_Section):
    """Low-rank factors are trained instead of the weights: each adapted weight is base + B A * alpha / rank."""

    rank: PositiveInt = 16
    """Columns of B and rows of A."""
    alpha: PositiveFloat = 32.0
    """The product of the factors is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Which linear layers are adapted, by the end of their names, such as "q_proj" or "layers.0.mlp.up_proj"; none
    named: all but the output layer."""


class ParallelConfig(_Section):
    """How many processes train one model, and what each holds of it."""

    ranks: PositiveInt = 1
    """Processes, each with a GPU of its own where there are some. ranks / tensor of them have different data."""
    tensor: PositiveInt = 1
    """Over how many ranks each matrix is divided ("fsdp", "megatron")."""
    expert: PositiveInt = 1
    """Over how many ranks the experts of a layer are divided ("fsdp"); they are also data parallel."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    """For "deepspeed", what is divided: 1 optimizer states, 2 gradients as well, 3 weights as well."""
    listen: str | None = None
    """HOST:PORT of this machine, where the run waits for ranks that you start by torchrun, here or on other machines;
    it says how. Without it, the run starts them itself."""

    @model_validator(mode="after")
    def _ranks_divide(self) -> ParallelConfig:
        for name, size in (("tensor", self.tensor), ("expert", self.expert)):
            if self.ranks % size:
                raise ValueError(
                    f"trainer.parallel.ranks = {self.ranks} is no multiple of trainer.parallel.{name} = {size}"
                )
        return self

    @model_validator(mode="after")
    def _listens_at_an_address(self) -> ParallelConfig:
        if self.listen is not None and not re.fullmatch(r"[^\s:]+:[1-9]\d{0,4}", self.listen):
            raise ValueError(f'trainer.parallel.listen = "{self.listen}" is not HOST:PORT, such as "10.0.0.5:29400"')
        return self


class TrainerConfig(_Section):
    """How the loss becomes new weights."""

    kind: Literal["local", "fsdp", "deepspeed", "megatron"] = "local"
    """"local": one process, one device; the others share the model among the ranks of [trainer.parallel]."""
    parallel: ParallelConfig | None = None
    """With a section [trainer.parallel]: how "fsdp", "deepspeed" and "megatron" share the model."""
    lr: PositiveFloat = 2e-5
    """Learning rate of RL."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    master_weights: Literal["float32", "none"] = "float32"
    """What AdamW updates when the model is in bfloat16: "float32" copies of the weights, or with "none" the weights
    themselves with stochastic rounding, which saves 4 bytes a weight."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    tokens_per_microbatch: PositiveInt = 1024
    """Unique tokens of one forward and backward pass; on a CPU, each core has one under way. More take more memory and,
    on a CPU, hardly less time."""
    activation_checkpointing: bool = False
    """Whether decoder layers are computed again in the backward pass instead of being kept: the same gradients to the
    bit, with less memory and in more time."""
    minibatches: PositiveInt = 1
    """Optimizer steps per batch of rollouts. Above 1 the batch is split by groups and PPO clipping comes to bear."""
    lora: LoraConfig | None = None
    """With a section [trainer.lora], if only an empty one, low-rank factors are trained; without, all weights."""


class WeightsConfig(_Section):
    """How new weights reach engines that do not share the trainer's memory."""

    form: Literal["full", "delta"] = "full"
    """"delta": only what changed since the step before, without loss."""
    transport: Literal["auto", "shared", "disk"] = "auto"
    """Where they are written: "shared" memory of the trainer's machine, from which Ray brings them to other nodes, or
    "disk", the run folder, for engines or ranks that mount it elsewhere; "auto": shared memory while all engines and
    ranks are started by the run."""


class ClusterConfig(_Section):
    """Where the parts of the run are placed by Ray. Without `address` (or `upspiral run --on`) Ray is not used."""

    address: str | None = None
    """"local": Ray is started on this machine for the run; "auto": the cluster that this machine belongs to; or
    "ray://HOST:10001". The run folder and the model must have the same paths on every node."""
    engines: PositiveInt = 1
    """Engine actors, between which the router chooses; one of [engine.server] has `replicas` of its own."""
    engine_cpus: PositiveFloat = 1.0
    """CPUs of an engine actor: Ray counts them, and an embedded engine has so many threads."""
    engine_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of an engine actor; with `engine.colocated`, as many ranks take turns with it, one on each."""
    rank_cpus: PositiveFloat = 1.0
    """CPUs of a rank of the trainer: Ray counts them, and one that computes on CPUs has so many threads."""
    rank_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of a rank of the trainer; with `engine.colocated` none of its own, as it has one of its engine's."""
    sandbox_hosts: Annotated[int, Field(ge=0)] = 0
    """Actors that serve sandboxes, on as many nodes as there are; 0: they are made where the run is."""
    restarts: Annotated[int, Field(ge=0)] = 20
    """How often the run goes on from the same checkpoint when an actor died that it cannot do without."""


class EvalConfig(_Section):
    """Measuring on held-out tasks."""

    tasks: Annotated[int, Field(ge=0)] = 200
    """How many held-out tasks; 0 switches evaluation off."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after each so many steps as well as before and after training; 0: only before and after."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature of evaluation; 0 is greedy."""


class CheckpointConfig(_Section):
    """What a crash can cost."""

    every: PositiveInt = 5
    """Steps between checkpoints. Steps since the last one are trained again from the stored rollouts on resume."""
    keep: PositiveInt = 1
    """How many of the newest checkpoints stay on disk."""


class RunConfig(_Section):
    """A whole run."""

    name: str = "run"
    """Shown in reports; the default run folder is runs/NAME."""
    seed: int = 0
    """Seeds sampling, task order and demonstrations."""
    steps: PositiveInt = 20
    """RL steps."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training rollouts; the loss uses the same."""
    budget_minutes: PositiveFloat | None = None
    """Stop RL in time to finish evaluation within this many minutes; unset: no limit."""
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    env: EnvConfig = EnvConfig()
    agent: AgentConfig
    sandbox: SandboxConfig = SandboxConfig()
    gateway: GatewayConfig = GatewayConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
