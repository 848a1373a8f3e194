"""How the ranks of FSDP2 divide a model: the meshes, and which of a layer's weights lie across which of them.

data      all ranks / tensor; each has batches of its own. Every weight is divided over it, layer by layer.
tensor    ranks with the same batches: projections are divided by heads and inner width, experts by number.
experts   neighbours in `data` that divide the experts by number and send each other their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from upspiral.config.models import ParallelConfig
from upspiral.errors import ConfigError
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.division import divided_counts
from upspiral.weights.experts import has_experts
from upspiral.weights.model_files import ModelFiles

_STYLES: dict[str, Callable[[], ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""By the names that transformers' plans have for them."""
_PLAN_PREFIX = "layers.*."


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The meshes of all ranks."""

    data: DeviceMesh
    tensor: DeviceMesh | None
    experts: DeviceMesh | None
    """Across which experts are divided by number."""
    experts_data: DeviceMesh
    """Across which each expert is divided."""
    dispatches: bool
    """Whether the ranks of `experts` have different tokens, and send them to each other."""

    @classmethod
    def of(cls, parallel: ParallelConfig, device: str) -> Layout:
        """Every rank makes the same; they must be as many as `parallel.ranks`."""
        ranks = distributed.get_world_size()
        if parallel.expert > 1:
            mesh = init_device_mesh(
                device, (ranks // parallel.expert, parallel.expert), mesh_dim_names=("experts_data", "experts")
            )
            return cls(mesh._flatten("data"), None, mesh["experts"], mesh["experts_data"], dispatches=True)
        mesh = init_device_mesh(
            device, (ranks // parallel.tensor, parallel.tensor), mesh_dim_names=("data", "tensor")
        )  # fmt: skip
        tensor = mesh["tensor"] if parallel.tensor > 1 else None
        return cls(mesh["data"], tensor, tensor, mesh["data"], dispatches=False)

    def close(self) -> None:
        """Ends the groups, each of which has threads of its own."""
        meshes = (self.data, self.tensor, self.experts, self.experts_data)
        for group in {mesh.get_group() for mesh in meshes if mesh is not None} - {distributed.group.WORLD}:
            distributed.destroy_process_group(group)


def check(setup: TrainerSetup, config: Any, ranks: int) -> ParallelConfig:
    """How the model, of whose `config.json` this is, shall be divided over that many ranks. Raises ConfigError for what
    cannot be."""
    parallel = setup.trainer.parallel or ParallelConfig()
    experts = getattr(config, "num_experts", 0)
    by_tensor = divided_counts("fsdp", key_heads=config.num_key_value_heads, experts=experts, inner=0, experts_inner=0)
    refusals = [
        (setup.trainer.lora is not None, 'trainer.lora is for trainer.kind = "local"; leave that section out'),
        (
            setup.trainer.master_weights == "none",
            'trainer.master_weights = "none" is for trainer.kind = "local"; "fsdp" divides float32 over all ranks',
        ),
        (
            parallel.ranks != ranks,
            f"trainer.parallel.ranks = {parallel.ranks}, but {ranks} were started",
        ),
        (
            parallel.tensor > 1 and parallel.expert > 1,
            f"trainer.parallel.tensor = {parallel.tensor} and trainer.parallel.expert = {parallel.expert}: set one of "
            "them to 1 (tensor divides experts, too)",
        ),
        (
            parallel.expert > 1 and not experts,
            f"trainer.parallel.expert = {parallel.expert}, but the model has no experts; leave it out",
        ),
        *(
            (bool(count % size), f"trainer.parallel.{key} = {size} does not divide the model's {count} {what}")
            for key, size, what, count in (
                *(("tensor", parallel.tensor, what, count) for what, count in by_tensor.items()),
                ("expert", parallel.expert, "experts", experts),
            )
        ),
    ]
    for refused, why in refusals:
        if refused:
            raise ConfigError(why)
    return parallel


def divide(whole: nn.Module, model: Any, files: ModelFiles, layout: Layout, setup: TrainerSetup) -> None:
    """Fills and divides a skeleton of `files` in place, layer by layer: no rank ever holds more than its part and one
    layer. `whole` is what is called: its own weights are what is left of the model's, embedding and output layer.
    Gradients of ranks are added."""
    precision, dtype = MixedPrecisionPolicy(), getattr(torch, setup.dtype)
    if setup.dtype == "bfloat16":
        # What is divided is in float32: the masters. Casts are the model's own affair, RoPE's angles stay as they are.
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    plan = _plan(model)
    for number, layer in enumerate(model.model.layers):
        files.fill(layer, f"model.layers.{number}.", dtype, setup.device)
        if layout.tensor is not None:
            own = {name: style() for name, style in plan.items() if _has(layer, name)}
            parallelize_module(layer, layout.tensor, own, src_data_rank=None)
        if layout.experts is not None and has_experts(layer.mlp):
            _divide_by_number(layer.mlp.experts, layout.experts)
            _add_gradients(fully_shard(layer.mlp.experts, mesh=layout.experts_data, mp_policy=precision))
        _add_gradients(fully_shard(layer, mesh=layout.data, mp_policy=precision))
    files.fill(model, "", dtype, setup.device)
    model.tie_weights()
    model.model.rotary_emb.to(setup.device)
    _add_gradients(fully_shard(whole, mesh=layout.data, mp_policy=precision))


def head_norms(model: Any) -> list[nn.Parameter]:
    """The norms of queries and keys, which see the heads of their own rank only."""
    attentions = [layer.self_attn for layer in model.model.layers]
    return [
        getattr(attention, name).weight for attention in attentions for name in ("q_norm", "k_norm")
        if hasattr(attention, name)
    ]  # fmt: skip


def _plan(model: Any) -> dict[str, Callable[[], ParallelStyle]]:
    """Of one layer, from transformers' own. What it has beside linear layers is replicated here or done by number."""
    plan = type(model.config).base_model_tp_plan
    return {
        name.removeprefix(_PLAN_PREFIX): _STYLES[style]
        for name, style in plan.items()
        if style in _STYLES and ".experts." not in name
    }


def _has(layer: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    return hasattr(layer.get_submodule(parent), own)


def _divide_by_number(experts: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(experts.named_parameters(recurse=False)):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part))


def _add_gradients(module: FSDPModule) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
