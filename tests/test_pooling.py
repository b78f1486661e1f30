"""What the predictor reads: windows and sequences, without padding."""

import pytest
import torch
from torch import Tensor

from hf_focus.pooling import pool_global

# Longer than one block of queries
LENGTH, BATCH = 150, 3
LENGTHS = (150, 100, 7)


def outputs() -> Tensor:
    return torch.randn(BATCH, LENGTH, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def padding(left: bool) -> Tensor:
    """(B, 1, T, T) bool."""
    position = torch.arange(LENGTH)
    tokens = torch.stack([position >= LENGTH - n if left else position < n for n in LENGTHS])
    return tokens[:, None, None].expand(-1, 1, LENGTH, LENGTH)


def test_token_is_the_output() -> None:
    output = outputs()
    assert pool_global(output, padding(left=True), "token", 8) is output


def test_sequence_is_the_mean_over_time() -> None:
    output = outputs()
    torch.testing.assert_close(
        pool_global(output, None, "sequence", 8), output.mean(dim=1, keepdim=True).expand_as(output)
    )


@pytest.mark.parametrize("size", [1, 6, 7, 64, 400])
def test_window_is_the_mean_around(size: int) -> None:
    output = outputs()
    pooled = pool_global(output, None, "window", size)
    for t in range(LENGTH):
        around = output[:, max(t - size // 2, 0) : t + size // 2 + 1]
        torch.testing.assert_close(pooled[:, t], around.mean(dim=1))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("granularity", ["window", "sequence"])
@pytest.mark.parametrize("kind", ["bool", "additive", "row"])
def test_padding_is_not_pooled(left: bool, granularity: str, kind: str) -> None:
    output, mask = outputs(), padding(left)
    if kind == "row":
        mask = mask[:, :, :1]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for row, n in enumerate(LENGTHS):
        output[row, slice(0, LENGTH - n) if left else slice(n, LENGTH)] = 1e6
    pooled = pool_global(output, mask, granularity, 10)
    assert pooled.isfinite().all()
    for row, n in enumerate(LENGTHS):
        part = slice(LENGTH - n, LENGTH) if left else slice(0, n)
        alone = pool_global(output[row : row + 1, part], None, granularity, 10)
        torch.testing.assert_close(pooled[row : row + 1, part], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["token", "window", "sequence"])
def test_gradient(granularity: str) -> None:
    output = outputs()[:, :20].requires_grad_()
    mask = padding(left=False)[:, :, :20, :20]
    assert torch.autograd.gradcheck(lambda x: pool_global(x, mask, granularity, 6), output)
