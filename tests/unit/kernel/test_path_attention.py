"""The compiled attention beside plain matrix products, and that nothing beside a query changes its bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upspiral.kernel import build
from upspiral.kernel.path_attention import PathAttention, Plan, Segment, path_attention
from upspiral.weights.cpu import use_threads

SCALE = 0.3


@pytest.fixture
def compiled() -> Iterator[PathAttention]:
    made = path_attention()
    if made is None:
        pytest.skip(f"no compiled attention here: {build.missing_instructions() or 'no C++ compiler'}")
    yield made


@st.composite
def trees(draw: st.DrawFn) -> list[Segment]:
    """Segments that each hang below some token of an earlier one, or are roots."""
    segments: list[Segment] = []
    end = 0
    for _ in range(draw(st.integers(1, 6))):
        runs: list[tuple[int, int]] = []
        if segments and draw(st.booleans()):
            above = draw(st.sampled_from(segments))
            left = draw(st.integers(1, sum(length for _, length in above.runs)))
            for start, length in above.runs:
                if left > 0:
                    runs.append((start, min(length, left)))
                left -= length
        length = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 130]))
        segments.append(Segment(end, end + length, [*runs, (end, length)]))
        end += length
    return segments


SHAPES = [(9, 3, 64), (4, 4, 16), (14, 2, 128), (8, 1, 32), (2, 1, 80)]


def heads(segments: list[Segment], shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a gradient; queries and gradient in memory as a model makes them, [tokens, heads]."""
    torch.manual_seed(0)
    query_heads, key_heads, width = shape
    tokens = segments[-1].query_end
    query, grad = (torch.randn(tokens, query_heads, width, dtype=dtype).transpose(0, 1) for _ in range(2))
    key, value = (torch.randn(key_heads, tokens, width, dtype=dtype) for _ in range(2))
    return [query, key, value, grad]


def plainly(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment]) -> Tensor:
    group = len(query) // len(key)
    key, value = (tensor.repeat_interleave(group, dim=0) for tensor in (key, value))
    outputs = []
    for segment in segments:
        seen = torch.cat([torch.arange(start, start + length) for start, length in segment.runs])
        scores = query[:, segment.query_start : segment.query_end] @ key[:, seen].mT * SCALE
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(seen) - scores.shape[1] + 1)
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value[:, seen])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@settings(max_examples=20, deadline=None)
@given(segments=trees(), shape=st.sampled_from(SHAPES))
def test_results_and_gradients_are_those_of_plain_products(
    dtype: torch.dtype, tolerance: float, threads: int, segments: list[Segment], shape: tuple[int, int, int]
) -> None:
    compiled = path_attention()
    if compiled is None:
        pytest.skip("no compiled attention here")
    query, key, value, grad = heads(segments, shape, dtype)
    plan = Plan.of(segments, shape[0] // shape[1])
    use_threads(threads)
    result = compiled.forward(query, key, value, plan, SCALE)
    ours = [result[0], *compiled.backward((query, key, value), result, grad, plan, SCALE)]
    use_threads(1)
    precise = tuple(tensor.double().requires_grad_() for tensor in (query, key, value))
    output = plainly(precise[0], precise[1], precise[2], segments)
    theirs = [output.detach(), *torch.autograd.grad(output, precise, grad.double())]
    for mine, wanted in zip(ours, theirs, strict=True):
        # A gradient may be what is left of terms as large as `grad` that cancel.
        assert (mine.double() - wanted).norm() <= tolerance * (wanted.norm() + grad.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), segments=trees(), shape=st.sampled_from(SHAPES))
def test_a_query_has_the_same_bits_however_it_is_put_together_with_others(
    dtype: torch.dtype, data: st.DataObject, segments: list[Segment], shape: tuple[int, int, int]
) -> None:
    compiled = path_attention()
    if compiled is None:
        pytest.skip("no compiled attention here")
    query, key, value, _ = heads(segments, shape, dtype)
    group = shape[0] // shape[1]
    together, lse = compiled.forward(query, key, value, Plan.of(segments, group), SCALE)
    segment = data.draw(st.sampled_from(segments))
    token = data.draw(st.integers(segment.query_start, segment.query_end - 1))
    # Alone, with its keys moved together, as a decoding engine has them.
    seen = torch.cat([torch.arange(start, start + length) for start, length in segment.runs])
    seen = seen[: len(seen) - (segment.query_end - 1 - token)]
    alone = Plan.of([Segment(0, 1, [(0, len(seen))])], group)
    output, own_lse = compiled.forward(query[:, [token]], key[:, seen], value[:, seen], alone, SCALE)
    assert torch.equal(output[:, 0], together[:, token])
    assert torch.equal(own_lse[:, 0], lse[:, token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5), shape=st.sampled_from(SHAPES))
def test_decoding_gives_the_same_bits(dtype: torch.dtype, lengths: list[int], shape: tuple[int, int, int]) -> None:
    compiled = path_attention()
    if compiled is None:
        pytest.skip("no compiled attention here")
    torch.manual_seed(0)
    query_heads, key_heads, width = shape
    query = torch.randn(len(lengths), query_heads + 3, width, dtype=dtype)[:, :query_heads]
    # Slots as the engine has them: keys and values of a position side by side, in more slots than are asked for.
    cache = torch.randn(len(lengths) + 2, 2 * key_heads, 200, width, dtype=dtype)
    keys, values = cache.split(key_heads, dim=1)
    slots = torch.arange(len(lengths)).flip(0) + 1
    output = compiled.decode(query, (keys, values), slots, torch.tensor(lengths), SCALE)
    for index, (slot, length) in enumerate(zip(slots.tolist(), lengths, strict=True)):
        plan = Plan.of([Segment(0, 1, [(0, length)])], query_heads // key_heads)
        alone, _ = compiled.forward(
            query[index, :, None], keys[slot, :, :length], values[slot, :, :length], plan, SCALE
        )
        assert torch.equal(output[index], alone[:, 0])


def test_tokens_of_no_segment_get_zeros(compiled: PathAttention) -> None:
    query, key, value, _ = heads([Segment(0, 5, [(0, 5)])], (2, 1, 16), torch.float32)
    output, _ = compiled.forward(query, key, value, Plan.of([Segment(0, 3, [(0, 3)])], 2), SCALE)
    assert output[:, :3].abs().min() > 0 and output[:, 3:].abs().max() == 0


def test_what_it_cannot_compute_is_left_to_torch() -> None:
    query, key = torch.zeros(4, 3, 16), torch.zeros(2, 3, 16)
    assert PathAttention.takes(query, key) and PathAttention.takes(query.bfloat16(), key.bfloat16())
    assert not PathAttention.takes(query.double(), key.double())
    assert not PathAttention.takes(query[..., :8], key[..., :8])
    assert not PathAttention.takes(query.repeat(40, 1, 1), key[:1])


def test_a_compiler_that_fails_is_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if build.missing_instructions():
        pytest.skip(build.missing_instructions())
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    build.load.cache_clear()
    assert build.load("path_attention") is None
    build.load.cache_clear()
    assert "path attention is computed by torch, which is slower: false did not make it" in caplog.text
