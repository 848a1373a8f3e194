"""Sampling draws from the distribution it reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.engine.embedded.sampler import sample
from upspiral.types import SamplingParams


def _draw(logits: torch.Tensor, count: int, **params: float) -> tuple[np.ndarray, np.ndarray]:
    uniforms = np.random.default_rng(0).random(count).tolist()
    each = replace(SamplingParams(max_tokens=1), **params)
    tokens, logprobs, _ = sample(logits.expand(count, -1), [each] * count, uniforms)
    return np.array(tokens), np.array(logprobs)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 2.0, "min_p": 0.05, "top_k": 6, "top_p": 0.8},
    ],
)
def test_frequencies_are_the_reported_probabilities(params: dict[str, float]) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 3
    tokens, logprobs = _draw(logits, 20_000, **params)
    for token in set(tokens.tolist()):
        probability = float(np.exp(logprobs[tokens == token][0]))
        margin = 5 * (probability / 20_000) ** 0.5 + 2e-4
        assert abs(float(np.mean(tokens == token)) - probability) < margin


def test_filters_keep_the_fewest_that_suffice() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    cases: list[tuple[dict[str, float], set[int]]] = [
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 1.0}, {0}),
    ]
    for params, kept in cases:
        tokens, logprobs = _draw(logits, 2000, **params)
        assert set(tokens.tolist()) == kept
        shares = {int(token): np.exp(logprobs[tokens == token][0]) for token in kept}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 400),
    kept=st.sets(st.integers(0, 399), min_size=1, max_size=5),
    uniform=st.sampled_from([0.0, 1e-12, 0.25, 0.5, 1 - 1e-9, float(np.nextafter(1.0, 0.0))]) | st.floats(0, 0.999999),
)
def test_never_a_token_of_probability_zero(size: int, kept: set[int], uniform: float) -> None:
    logits = torch.full((1, size), -torch.inf)
    possible = {index % size for index in kept}
    logits[0, list(possible)] = torch.linspace(-9, 9, len(possible))
    tokens, logprobs, _ = sample(logits, [SamplingParams(max_tokens=1)], [uniform])
    assert tokens[0] in possible
    assert np.isfinite(logprobs[0])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    params = [
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=1, temperature=0.7, top_k=20),
        SamplingParams(max_tokens=1, top_p=0.9),
    ]
    uniforms = [0.1, 0.2, 0.3, 0.4]
    tokens, logprobs, _ = sample(logits, params, uniforms)
    for row in range(4):
        alone = sample(logits[row : row + 1], params[row : row + 1], uniforms[row : row + 1])
        assert alone[0][0] == tokens[row]
        assert alone[1][0] == pytest.approx(logprobs[row], abs=1e-6)
