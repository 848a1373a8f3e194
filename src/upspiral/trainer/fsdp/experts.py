"""Experts that are divided by number over ranks, as functions of transformers' interface for experts.

`dispatched`: ranks have different tokens; each token's row goes to the ranks of its experts and comes back. `masked`:
ranks have the same tokens; each computes what its own experts make of them, and the results are added.

Shapes: T tokens, K experts of a token, C hidden width, E experts, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional as F

from upspiral.trainer.fsdp.optimizer import local


class DividedExperts:
    """Called as transformers calls an implementation of experts: module, hidden [T,C], chosen [T,K], weights [T,K]."""

    def __init__(self, group: Any, *, dispatches: bool) -> None:
        self._group, self._dispatches = group, dispatches

    def __call__(self, experts: Any, hidden_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        compute = self._dispatched if self._dispatches else self._masked
        return compute(experts, hidden_TC, chosen_TK, weights_TK)

    def _dispatched(self, experts: Any, hidden_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ranks, top_k = distributed.get_world_size(self._group), chosen_TK.shape[1]
        order = chosen_TK.flatten().argsort(stable=True)
        counts_E = chosen_TK.flatten().bincount(minlength=experts.num_experts)
        arriving_E = torch.empty_like(counts_E)
        distributed.all_to_all_single(arriving_E, counts_E, group=self._group)
        arriving_PE = arriving_E.view(ranks, -1)
        sent, received = counts_E.view(ranks, -1).sum(1).tolist(), arriving_PE.sum(1).tolist()
        rows = all_to_all_single_autograd(hidden_TC[order // top_k], received, sent, self._group)
        # They come by rank and then by expert, and are wanted by expert.
        numbers = torch.arange(arriving_PE.shape[1], device=rows.device).repeat(ranks)
        by_expert = numbers.repeat_interleave(arriving_PE.flatten()).argsort(stable=True)
        outputs = _computed(experts, rows[by_expert], arriving_PE.sum(0).tolist())
        back = all_to_all_single_autograd(outputs[by_expert.argsort()], sent, received, self._group)
        return _weighted(back[order.argsort()].unflatten(0, (-1, top_k)), weights_TK)

    def _masked(self, experts: Any, hidden_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ranks, top_k = distributed.get_world_size(self._group), chosen_TK.shape[1]
        own = experts.num_experts // ranks
        first = own * distributed.get_rank(self._group)
        hidden_TC, weights_TK = (_Shared.apply(each, self._group) for each in (hidden_TC, weights_TK))
        places = (chosen_TK.flatten() - first).clamp(-1, own)  # those of others: first or last
        order = places.argsort(stable=True)
        _, *counts, _ = (places + 1).bincount(minlength=own + 2).tolist()
        begin = int((places < 0).sum())
        mine = order[begin : begin + sum(counts)]
        outputs = _computed(experts, hidden_TC[mine // top_k], counts)
        spread = outputs.new_zeros(len(order), outputs.shape[1]).index_copy(0, mine, outputs)
        return _Added.apply(_weighted(spread.unflatten(0, (-1, top_k)), weights_TK), self._group)


def _computed(experts: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """What the rank's own experts make of rows that stand in their order. An expert without rows takes part, so that
    every weight has a gradient on every rank."""
    parts = zip(
        rows.split(list(counts)), local(experts.gate_up_proj).unbind(), local(experts.down_proj).unbind(), strict=True
    )
    outputs = []
    for part, gate_up, down in parts:
        gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(experts.act_fn(gate) * up, down))
    return torch.cat(outputs)


def _weighted(outputs_TKC: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, C], added up in float32."""
    return (outputs_TKC.float() * weights_TK[..., None].float()).sum(1).to(outputs_TKC.dtype)


class _Shared(torch.autograd.Function):
    """What every rank has; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensor, ctx.group = inputs
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Added(torch.autograd.Function):
    """The sum over ranks; each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tensor, group = inputs
        total = tensor.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
