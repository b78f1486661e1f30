"""How the blocked path cuts a problem up: every query once, every key that it can see, and little else."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_focus import cells, focus_attention
from hf_focus.attention import keep_problems
from hf_focus.iteration import soft_span_mask
from hf_focus.problem import FocusProblem


def problem_of(span: Tensor, num_keys: int, **arguments: Any) -> FocusProblem:
    batch, _, length = span.shape
    query, key = torch.randn(batch, 2, length, 4), torch.randn(batch, 2, num_keys, 4)
    with keep_problems() as kept:
        focus_attention(query, key, key, span, **arguments)
    return kept[0]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    length=st.integers(1, 90),
    before=st.integers(0, 40),
    max_span=st.integers(1, 60),
    ramp=st.integers(1, 9),
    size=st.integers(1, 40),
    is_causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cells_hold_each_query_once_with_all_that_it_sees(
    length: int, before: int, max_span: int, ramp: int, size: int, is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    span = torch.rand(3, 2, length) * max_span * torch.rand(1, 1, 1)
    num_keys = length + before
    p = problem_of(span, num_keys, max_span=max_span, ramp=ramp, is_causal=is_causal, query_offset=before)
    distance = torch.arange(length)[:, None] + before - torch.arange(num_keys)
    weight = soft_span_mask(distance.abs(), span[..., None], ramp, max_span)
    seen = (weight > 0) & ((distance >= 0) | (not is_causal))
    times = torch.zeros(3, length, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        # So small that rows of the batch must be taken apart
        patch.setitem(cells.MOST_SCORES, "cpu", 2 * size * (size + max_span))
        for cell in cells.cells(p, size):
            times[cell.rows, cell.queries] += 1
            outside = seen[cell.rows, :, cell.queries].clone()
            outside[..., cell.keys] = False
            assert not outside.any()
            assert cell.queries.stop - cell.queries.start <= size
            assert cell.keys.stop - cell.keys.start <= size + (max_span - 1) * (1 if is_causal else 2)
    assert (times == 1).all()


def test_short_spans_read_few_keys() -> None:
    span = torch.full((1, 2, 256), 10.0)
    p = problem_of(span, 256, max_span=128, ramp=4)
    assert max(cell.keys.stop - cell.keys.start for cell in cells.cells(p, 16)) <= 16 + cells.REACH_STEP


def test_a_span_that_is_no_number_reads_all() -> None:
    span = torch.full((1, 2, 64), 1.0)
    span[0, 1, 40] = float("nan")
    p = problem_of(span, 64, max_span=33, ramp=4)
    reaches = [cell.queries.stop - 1 - cell.keys.start for cell in cells.cells(p, 32)]
    assert reaches[1] == 31 + 32


@pytest.mark.parametrize(
    ("batch", "longest", "size"),
    [
        (1, 8.0, 64),
        (16, 8.0, 32),
        (16, 12.0, 32),
        (16, 13.0, 64),
        (16, 60.0, 64),
        (16, 61.0, 96),
        (16, float("nan"), 96),
    ],
)
def test_cells_have_fewer_queries_where_no_span_is_long_and_heads_are_many(
    batch: int, longest: float, size: int
) -> None:
    span = torch.full((batch, 2, 200), 1.0)
    span[-1, 0, 100] = longest
    p = problem_of(span, 200, max_span=128, ramp=4)
    assert {cell.queries.stop - cell.queries.start for cell in cells.cells(p)} == {size, 200 % size}


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_smallest_cells_are_exact(is_causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(8, 4, 70, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    span = (torch.rand(8, 4, 70, dtype=torch.float64) * 12).requires_grad_()
    leaves, found = (query, key, value, span), []
    for backend in ("blocked", "reference"):
        output = focus_attention(*leaves, max_span=128, ramp=4, is_causal=is_causal, backend=backend).output
        found.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_buffers_of_a_name_share_memory_and_grow() -> None:
    buffers = cells.Buffers(torch.zeros(1), torch.float32)
    small = buffers("a", 2, 3)
    assert buffers("a", 2, 3) is small
    assert buffers("b", 2, 3).data_ptr() != small.data_ptr()
    large = buffers("a", 10, 10)
    assert large.shape == (10, 10)
    assert buffers("a", 5).data_ptr() == large.data_ptr()
