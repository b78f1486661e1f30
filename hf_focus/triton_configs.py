"""Block sizes of the fused kernels: short lists, cut down to what fits on the chip for a given problem."""

from functools import cache
from typing import Any, NamedTuple

from .problem import FocusProblem

# Bytes of static shared memory that the compiler needs beside the tiles, for reductions and layout changes
SHARED_RESERVE = 18 * 1024


class Sizes(NamedTuple):
    """What of a problem decides on block sizes: head sizes, rounded up to powers of two; bytes of a number; and bytes
    of a pair's mask and bias, where those have 4 or more, and are read ahead as keys are."""

    dim: int
    value_dim: int
    itemsize: int
    mask_bytes: int = 0

    @classmethod
    def of(cls, p: FocusProblem) -> "Sizes":
        sizes = [x.dtype.itemsize for x in (p.attention_mask, p.position_bias) if x is not None]
        mask_bytes = sum(size for size in sizes if size >= 4)
        return cls(padded(p.query.shape[-1]), padded(p.value.shape[-1]), p.query.element_size(), mask_bytes)

    @property
    def widest(self) -> int:
        return max(self.dim, self.value_dim)


class Config(NamedTuple):
    """block_q queries against tiles of block_k keys, in `warps` warps; `stages` tiles of both keys and values are held
    at once, the one that is multiplied among them: 1 reads none ahead."""

    block_q: int
    block_k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def forward_bytes(self, sizes: Sizes) -> int:
        """Shared memory that forward needs, at most: keys and values, or F; queries; masks."""
        read_ahead = self.stages * self.block_k * (sizes.dim + sizes.value_dim)
        held = max(read_ahead, sizes.dim * sizes.value_dim) + self.block_q * sizes.widest
        masks = (self.stages - 1) * self.block_q * self.block_k * sizes.mask_bytes
        return held * sizes.itemsize + masks + SHARED_RESERVE

    def backward_bytes(self, sizes: Sizes) -> int:
        """The same of backward."""
        tiles = (self.block_k + self.block_q) * (sizes.dim + sizes.value_dim) * 3 // 2
        fed_back = sizes.dim * sizes.value_dim + 2 * self.block_q * sizes.widest
        return max(tiles, fed_back) * sizes.itemsize + SHARED_RESERVE


# By the wider head, best guess first. Products of 64 rows and more are Hopper's asynchronous ones. They must not span
# two groups of four warps: Triton up to 3.7 does not make one wait for the other before its operands are overwritten
# (its issue 11047), and results in float32, of three products each, were wrong on an H200. Rows are queries, in
# gradients keys, and for the gradient of F its own: with eight warps that is one product, with a barrier behind it
FORWARD = {
    64: (Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(32, 32, 4, 2)),
    128: (Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(32, 32, 4, 2)),
    256: (Config(32, 32, 8, 2), Config(16, 32, 8, 2), Config(16, 16, 8, 2)),
}
FORWARD_FLOAT32 = (Config(32, 32, 8, 1), Config(16, 32, 8, 1))
BACKWARD = {
    64: (Config(64, 64, 4, 1), Config(32, 32, 4, 1)),
    128: (Config(32, 32, 4, 1), Config(16, 32, 4, 1)),
    256: (Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
}
BACKWARD_FLOAT32 = (Config(32, 32, 4, 1), Config(16, 32, 4, 1))

# Triton's interpreter has no speed to tune for; small blocks give small problems several blocks and tiles
INTERPRETER = Config(16, 32, 4, 1)


def padded(size: int) -> int:
    """A head size as the kernels hold it: a power of two, 16 at least."""
    return max(_power_of_two(size), 16)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@cache
def forward_configs(sizes: Sizes, shared_memory: int) -> tuple[Config, ...]:
    """The configurations that fit, best guess first; empty if none does.

    Args:
        shared_memory: bytes that a program may have.
    """
    if sizes.itemsize == 4:
        # With three products for one they take half a minute to compile: the first is taken unmeasured
        return tuple(config for config in FORWARD_FLOAT32 if config.forward_bytes(sizes) <= shared_memory)[:1]
    candidates = FORWARD[max(sizes.widest, 64)]
    return tuple(config for config in candidates if config.forward_bytes(sizes) <= shared_memory)


@cache
def backward_config(sizes: Sizes, shared_memory: int) -> Config | None:
    """Block sizes for backward, which is never measured: it adds into memory. None if nothing fits."""
    candidates = BACKWARD_FLOAT32 if sizes.itemsize == 4 else BACKWARD[max(sizes.widest, 64)]
    return next((config for config in candidates if config.backward_bytes(sizes) <= shared_memory), None)


def decode_config(p: FocusProblem) -> dict[str, Any]:
    """Launch options for one query a sequence: tiles of about 8,192 numbers."""
    dim, value_dim = padded(p.query.shape[-1]), padded(p.value.shape[-1])
    block_k = max(min(8192 // max(dim, value_dim), _power_of_two(p.max_span)), 16)
    # F is held whole, at most 128 numbers a thread
    return {"BLOCK_K": block_k, "num_warps": max(4, dim * value_dim // 4096), "num_stages": 2}
