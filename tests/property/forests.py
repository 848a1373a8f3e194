"""Random rollouts, and models small enough to check gradients in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from upspiral.trainer.attention import forest_attention
from upspiral.trainer.forest import Item
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import UNKNOWN_EXPERT, NodeCredit, RolloutCredit

VOCABULARY = 24
SYSTEM = [1, 2, 3, 4]


@st.composite
def rollouts(draw: st.DrawFn, number: int) -> Item:
    """A rollout with forks, retries, several roots and per-node credit of both signs."""
    graph = TrajectoryGraph(f"r{number}")
    prompt = SYSTEM + draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    graph.add(None, TokenRun.given(prompt), role="user", reason="root")
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.none() | st.integers(0, graph.next_id - 1))
        tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)
        if parent is None or draw(st.integers(0, 3)) == 0:
            run = TokenRun.given((SYSTEM[:2] if parent is None else []) + draw(tokens))
            graph.add(parent, run, role="user", reason="root" if parent is None else "append")
            continue
        sampled = draw(tokens)
        logprobs = draw(st.lists(st.floats(-5, -0.1), min_size=len(sampled), max_size=len(sampled)))
        run = TokenRun.answer(draw(st.sampled_from([[], [7], [7, 8]])), sampled, logprobs, [0] * len(sampled), "stop")
        graph.add(parent, run, role="assistant", reason="append")
    advantage = st.floats(0, 2)
    nodes = tuple(NodeCredit(node.id, draw(advantage), -draw(advantage)) for node in graph.nodes if node.num_sampled)
    masked = draw(st.sampled_from([None, None, None, "no_signal"])) if nodes else "no_tokens"
    weight = draw(st.floats(0.05, 1))
    return graph, RolloutCredit(graph.rollout_id, f"g{number % 2}", () if masked else nodes, weight, masked)


def batches_of_rollouts() -> st.SearchStrategy[list[Item]]:
    return st.integers(1, 4).flatmap(lambda count: st.tuples(*map(rollouts, range(count))).map(list))


def with_routes(items: Sequence[Item], shape: tuple[int, int], experts: int, habits: Sequence[int]) -> list[Item]:
    """The same rollouts with routes of shape [layers, experts of a token]. Rollouts of the same habit, in their order,
    send equal prefixes to equal experts; nobody knows where to by habit 0."""
    return [
        (_routed(graph, shape, experts, habit), credit) for (graph, credit), habit in zip(items, habits, strict=False)
    ]


def _routed(graph: TrajectoryGraph, shape: tuple[int, int], experts: int, habit: int) -> TrajectoryGraph:
    routed = TrajectoryGraph(graph.rollout_id)
    for node in graph.nodes:
        path = graph.path_ids(node.id).tolist()
        first = len(path) - len(node.token_ids)
        rows = [_route(path[:end], shape, experts, habit) for end in range(first, len(path))]
        routed.append(replace(node, routes=np.array(rows, np.int16)))
    return routed


def _route(prefix: list[int], shape: tuple[int, int], experts: int, habit: int) -> list[list[int]]:
    """Of the last token of a prefix; unknown for one in eight, and where there is none."""
    chance = random.Random(repr((prefix, habit)))
    if not habit or not prefix or not chance.randrange(8):
        return np.full(shape, UNKNOWN_EXPERT).tolist()
    return [chance.sample(range(experts), shape[1]) for _ in range(shape[0])]


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in model.parameters()]


def relative_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """|a - b| / |b| over all tensors together, in the L2 norm; 0 when both are zero."""
    difference = math.sqrt(sum((a - b).double().square().sum().item() for a, b in zip(ours, theirs, strict=True)))
    scale = math.sqrt(sum(b.double().square().sum().item() for b in theirs))
    return difference / scale if scale else difference


class DoubleLlama(nn.Module):
    """A Llama-like model that is float64 throughout: transformers computes RMSNorm and RoPE in float32 whatever the
    dtype, which hides differences below 1e-7. Offers what the trainer asks of a model, on our attention."""

    def __init__(self, width: int = 16, heads: int = 4, key_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(DoubleLayer(number, width, heads, key_heads) for number in range(layers))
        self.double()

    def get_decoder(self) -> DoubleLlama:
        return self

    def get_output_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, forest: Any) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids, forest=forest)
        return SimpleNamespace(last_hidden_state=_norm(x))


class DoubleLayer(nn.Module):
    def __init__(self, number: int, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.key_heads, self.head = number, heads, key_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * key_heads * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, 2 * width, bias=False), "down": nn.Linear(2 * width, width, bias=False)}
        )

    def forward(self, x: Tensor, position_ids: Tensor, forest: Any) -> Tensor:
        normed = _norm(x)
        query = _rotate(self._split(self.query(normed), self.heads), position_ids)
        key, value = self._split(self.key_value(normed), 2 * self.key_heads).chunk(2, dim=1)
        mixed, _ = forest_attention(self, query, _rotate(key, position_ids), value, forest=forest)
        x = x + self.out(mixed.flatten(2))
        return x + self.mlp["down"](nn.functional.silu(self.mlp["up"](_norm(x))))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head)).transpose(1, 2)


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[0, :, None].double() / 100.0 ** (torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
