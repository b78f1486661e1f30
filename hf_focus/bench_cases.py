"""What one measurement of the benchmark is given: its size, its tensors, and the call that is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# FlashAttention's convention: backward makes five products where forward makes two
TRAINING_FLOPS = 3.5


@dataclass(frozen=True)
class Case:
    """One size of attention.

    Args:
        length: keys; queries too, unless `queries` says otherwise.
        span: keys that local attention sees, the query's own included.
        training: whether gradients are asked for.
        queries: T, the last positions; None: all.
        backend: of `focus_attention`.
        trained: file of inputs of a trained model by number of iterations, see `bench_trained`.
    """

    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    span: int = 256
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    training: bool = False
    queries: int | None = None
    backend: str = "auto"
    trained: tuple[tuple[int, str], ...] = ()

    @property
    def num_queries(self) -> int:
        return self.length if self.queries is None else self.queries


@dataclass
class Call:
    """What is timed.

    Args:
        forward: the work; its result is the output.
        leaves: what `differentiate` takes gradients of.
        training: whether `run` is forward + backward, or forward alone without gradients.
        facts: numbers of the row that the call knows of itself, such as flops; asked once, outside of timing.
    """

    forward: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    training: bool = False
    facts: Callable[[], dict[str, float]] = field(default=dict)
    gradient: Tensor | None = None

    def run(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.forward()
            return
        output = self.forward()
        if self.gradient is None:
            # Kept, so that making it is not timed again, nor counted as memory of the call
            self.gradient = torch.randn_like(output)
        # Not backward(): gradients do not pile up in the leaves that contenders share
        torch.autograd.grad(output, self.leaves, self.gradient)


@lru_cache(maxsize=1)
def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (B, H, T, D), key and value (B, H, S, D): the same tensors for all contenders of a case."""
    noise = torch.Generator().manual_seed(0)

    def random(length: int) -> Tensor:
        shape = (case.batch, case.heads, length, case.head_dim)
        return leaf(torch.randn(shape, generator=noise), case)

    return random(case.num_queries), random(case.length), random(case.length)


def leaf(tensor: Tensor, case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the case's device, with a gradient where the case trains. dtype None: the case's."""
    return tensor.detach().to(case.device, dtype or case.dtype, copy=True).requires_grad_(case.training)


def band_keys(case: Case, reach: Tensor | int) -> Tensor:
    """Keys that causal queries see at distances below `reach`, (T,) or broadcast against it."""
    position = torch.arange(case.length - case.num_queries, case.length, device=getattr(reach, "device", None))
    return torch.minimum(position + 1, torch.as_tensor(reach, device=position.device))


def band_facts(case: Case, keys: Tensor, iterations: Tensor | int, block: int) -> dict[str, float]:
    """Work that local attention cannot do without, and how it compares with what it was given.

    Args:
        keys: within reach of each query, broadcastable to (B, H, T).
        iterations: attentions that each query makes, broadcastable to (B, H, T).
        block: queries that share a slab of keys, for the products at the slab's edges.

    Returns:
        flops: 4·d for each pair of query and key in each iteration, 3.5 × that with backward; block_flops: with the
        slab's edges, × (w + block)/w; exponentials: one a pair, two with backward; bytes of device memory, whatever
        the iterations are; mean_keys and mean_iterations of a query.
    """
    shape = (case.batch, case.heads, case.num_queries)
    keys = torch.as_tensor(keys).double().expand(shape)
    iterations = torch.as_tensor(iterations, device=keys.device).double().expand(shape)
    pairs = (keys * iterations).sum().item()
    flops = 4 * case.head_dim * pairs * (TRAINING_FLOPS if case.training else 1)
    read = min(case.length, case.num_queries + case.span - 1)
    rows = (5 if case.training else 2) * case.num_queries + (6 if case.training else 2) * read
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    return {
        "flops": flops,
        "block_flops": flops * (case.span + min(block, case.num_queries)) / case.span,
        "exponentials": pairs * (2 if case.training else 1),
        "bytes": case.batch * case.heads * case.head_dim * itemsize * rows,
        "mean_keys": keys.mean().item(),
        "mean_iterations": iterations.mean().item(),
    }
