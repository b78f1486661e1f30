"""What a query may see, read from the masks of models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_focus.band_mask import BandMask
from hf_focus.masks import (
    count_visible,
    find_query_offset,
    gather_reach,
    is_visible,
    limit_distance,
    own_key_visible,
    read_mask,
    within_reach,
)

CPU = torch.device("cpu")
examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def causal_mask(length: int, num_keys: int, offset: int, padded: int = 0) -> Tensor:
    """(1, 1, T, S) bool: keys up to the query's own, the first `padded` hidden."""
    queries, keys = torch.arange(length)[:, None] + offset, torch.arange(num_keys)
    return ((keys <= queries) & (keys >= padded))[None, None]


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_visible(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -3.0, 5.0, lowest, float("-inf")], dtype=dtype)
    assert is_visible(mask).tolist() == [True, True, True, False, False]
    assert is_visible(is_visible(mask)).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize(("length", "num_keys", "offset"), [(1, 9, 8), (3, 9, 6), (3, 12, 4), (1, 12, 5), (4, 12, 0)])
def test_query_offset_from_the_mask(length: int, num_keys: int, offset: int, padded: int, kind: str) -> None:
    """Dynamic caches, chunks of a prefill, and static caches with places still empty."""
    mask = causal_mask(length, num_keys, offset, padded)
    mask = mask if kind == "bool" else additive(mask)
    found = find_query_offset(mask, length, num_keys, is_causal=True)
    assert isinstance(found, Tensor)
    assert found.shape == ()
    assert found.dtype == torch.int64
    assert found.item() == offset


def test_query_offset_of_a_batch() -> None:
    """One row of it is all padding so far."""
    mask = torch.cat([causal_mask(2, 10, 4, padded=6), causal_mask(2, 10, 4, padded=1)])
    assert find_query_offset(mask, 2, 10, is_causal=True).item() == 4


def test_query_offset_beside_queries_that_see_later_ones() -> None:
    """Of an image, in the middle or at the end; and padding on the right of all rows, whose own keys nobody sees."""
    mask = causal_mask(6, 12, 3, padded=1)
    for image in (slice(1, 4), slice(2, 6)):
        seen = mask.clone()
        seen[:, :, image, 3 + image.start : 3 + image.stop] = True
        assert find_query_offset(seen, 6, 12, is_causal=True).item() == 3
    padded = mask.clone()
    padded[..., 6:] = False
    assert find_query_offset(padded, 6, 12, is_causal=True).item() == 3
    # All of them one another, after some that a cache holds
    mask[..., :9] = True
    assert find_query_offset(mask, 6, 12, is_causal=False).item() == 3


@pytest.mark.parametrize(
    ("length", "num_keys", "is_causal", "offset"),
    [(5, 5, True, 0), (1, 9, True, 8), (4, 12, True, 0), (5, 5, False, 0), (3, 8, False, 5), (1, 9, False, 8)],
)
def test_query_offset_without_a_mask(length: int, num_keys: int, is_causal: bool, offset: int) -> None:
    found = find_query_offset(None, length, num_keys, is_causal)
    assert isinstance(found, int)
    assert found == offset


@given(
    length=st.integers(1, 20),
    past=st.integers(0, 10),
    empty=st.integers(0, 5),
    max_span=st.integers(1, 12),
    is_causal=st.booleans(),
    kind=st.sampled_from(["none", "bool", "additive", "row"]),
    size=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 1000),
)
@examples
def test_count_visible(
    length: int, past: int, empty: int, max_span: int, is_causal: bool, kind: str, size: int, seed: int
) -> None:
    noise = torch.Generator().manual_seed(seed)
    num_keys = past + length + empty
    rows = 1 if kind == "row" else length
    visible = torch.rand(2, 1, rows, num_keys, generator=noise) < (2 if kind == "none" else 0.6)
    mask = {"none": None, "additive": additive(visible)}.get(kind, visible)
    counts = count_visible(mask, length, num_keys, past, max_span, is_causal, CPU, size=size)
    assert counts.dtype == torch.int64
    counts = counts.expand(2, 1, length)
    visible = visible.expand(2, 1, length, num_keys)
    for b in range(2):
        for t in range(length):
            keys = [s for s in range(num_keys) if abs(past + t - s) < max_span and (s <= past + t or not is_causal)]
            assert counts[b, 0, t] == max(sum(visible[b, 0, t, s].item() for s in keys), 1)


@pytest.mark.parametrize("kind", ["bool", "additive", "row"])
@pytest.mark.parametrize("past", [0, 3])
def test_own_key_visible(kind: str, past: int) -> None:
    tokens = torch.tensor([[True] * 9, [False] * 5 + [True] * 4])
    mask = tokens[:, None, None].expand(2, 1, 1 if kind == "row" else 6, 9)
    mask = additive(mask) if kind == "additive" else mask
    assert torch.equal(own_key_visible(mask, 6, 9, past, CPU), tokens[:, past : past + 6])
    assert own_key_visible(None, 6, 9, past, CPU).tolist() == [[True] * 6]


@given(
    length=st.integers(1, 6),
    num_keys=st.integers(1, 12),
    offset=st.integers(-2, 12),
    max_span=st.integers(1, 6),
    is_causal=st.booleans(),
    kind=st.sampled_from(["none", "bool", "additive", "row"]),
)
@examples
def test_gather_reach(length: int, num_keys: int, offset: int, max_span: int, is_causal: bool, kind: str) -> None:
    """Every place within reach holds its key, or is masked where no key is."""
    noise = torch.Generator().manual_seed(0)
    key = torch.arange(num_keys).float().view(1, 1, num_keys, 1)
    visible = torch.rand(1, 1, 1 if kind == "row" else length, num_keys, generator=noise) < 0.7
    given_mask = {"none": None, "additive": additive(visible)}.get(kind, visible)
    bias = torch.randn(1, 1, length, num_keys, generator=noise)
    near_key, near_value, mask, near_bias, start = gather_reach(
        key, key + 100, given_mask, bias, torch.tensor(offset), length, max_span, is_causal
    )
    width = length + (max_span - 1) * (1 if is_causal else 2)
    assert near_key.shape[2] == near_value.shape[2] == mask.shape[3] == width
    near_bias = near_bias.expand(1, 1, length, width)
    mask = is_visible(mask).expand(1, 1, length, width)
    for t in range(length):
        for place in range(width):
            s = offset + t + place - (start + t)
            if not 0 <= s < num_keys:
                assert not mask[0, 0, t, place]
                continue
            assert near_key[0, 0, place, 0] == s
            assert near_value[0, 0, place, 0] == s + 100
            assert near_bias[0, 0, t, place] == bias[0, 0, t, s]
            seen = kind == "none" or visible[0, 0, min(t, visible.shape[2] - 1), s]
            assert mask[0, 0, t, place] == seen
        own, reach = start + t, max_span - 1
        assert own - reach >= 0
        assert own + (0 if is_causal else reach) < width


@given(
    length=st.integers(1, 8),
    past=st.integers(0, 5),
    max_dist=st.integers(1, 9),
    sinks=st.integers(0, 3),
    is_causal=st.booleans(),
    kind=st.sampled_from(["none", "bool", "additive", "packed"]),
    as_tensor=st.booleans(),
    want_bool=st.booleans(),
)
@examples
def test_limit_distance(
    length: int, past: int, max_dist: int, sinks: int, is_causal: bool, kind: str, as_tensor: bool, want_bool: bool
) -> None:
    num_keys = past + length
    allowed = causal_mask(length, num_keys, past if is_causal else num_keys)
    if kind in ("bool", "additive"):
        # Left padding, one row each
        allowed = torch.cat([allowed & (torch.arange(num_keys) >= padded) for padded in (0, 2)])
    elif kind == "packed":
        document = (torch.arange(num_keys) >= num_keys // 2).long()
        allowed = allowed & (document[past:, None] == document)
    noise = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(0))
    mask = None if kind == "none" else allowed
    if kind == "additive":
        mask = noise.masked_fill(~allowed, torch.finfo(torch.float32).min)
    # A bool mask stays one
    want_bool = want_bool or kind in ("bool", "packed")
    dtype = torch.bool if want_bool else torch.float32
    offset = torch.tensor(past) if as_tensor else past
    result = limit_distance(mask, length, num_keys, offset, is_causal, max_dist, sinks, dtype, CPU)
    assert result.dtype == dtype
    for b in range(allowed.shape[0]):
        for t in range(length):
            seen = [s for s in range(num_keys) if allowed[b, 0, t, s]]
            wanted = [s for i, s in enumerate(seen) if i < sinks or abs(past + t - s) < max_dist]
            row = result[b, 0, t]
            assert is_visible(row).nonzero().flatten().tolist() == wanted
            if not want_bool:
                # What may be seen keeps what the mask adds to it
                assert all(row[s] == (noise[b, 0, t, s] if kind == "additive" else 0) for s in wanted)


def test_limit_distance_beyond_the_sequence_changes_nothing() -> None:
    mask = causal_mask(6, 6, 0, padded=1)
    assert torch.equal(limit_distance(mask, 6, 6, 0, True, 6, 0, torch.bool, CPU), mask)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "row", "band"])
@pytest.mark.parametrize(
    ("length", "num_keys", "offset"), [(1, 30, 29), (3, 30, 27), (3, 34, 20), (5, 9, 4), (9, 9, 0)]
)
def test_within_reach_nothing_that_can_be_seen_is_left_out(kind: str, length: int, num_keys: int, offset: int) -> None:
    max_span = 6
    numbers = torch.arange(num_keys)
    visible = causal_mask(length, num_keys, offset) & (numbers % 7 != 3)
    masks = {
        "none": None,
        "bool": visible,
        "additive": additive(visible),
        "row": (numbers % 7 != 3)[None, None, None],
        "band": BandMask(lambda b, h, q, k: (k <= q) & (k % 7 != 3), 1, length, num_keys, query_offset=offset),
    }
    key = numbers.float()[None, None, :, None]
    bias = numbers.expand(1, 1, length, num_keys)
    near_key, near_value, mask, near_bias, near_offset = within_reach(key, -key, masks[kind], bias, offset, max_span)
    for place in range(length):
        seen = offset + place - torch.arange(min(max_span, offset + place + 1))
        here = seen - offset + near_offset
        assert torch.equal(near_key[0, 0, here, 0], key[0, 0, seen, 0])
        assert torch.equal(near_value[0, 0, here, 0], -key[0, 0, seen, 0])
        assert torch.equal(near_bias[0, 0, place, here], bias[0, 0, place, seen])
        if mask is not None:
            before, after = (read_mask(m, slice(place, place + 1), slice(None))[0, 0, 0] for m in (masks[kind], mask))
            assert torch.equal(after[here], before[seen])
    assert near_key.shape[2] <= num_keys - offset + max_span
    assert near_key.data_ptr() >= key.data_ptr()
