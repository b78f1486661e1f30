"""Block sizes of the fused kernels: a short list, cut down to what fits on the chip for a given problem."""

from functools import cache
from typing import Any, NamedTuple

from .problem import FocusProblem

# Float32 numbers that a thread is asked to hold, of the 255 registers it has: a band's scores, two query-wide and
# three value-wide tiles. Kernels with up to this count spill little, and hardly within the loop
NUMBERS_PER_THREAD = 240
# Static shared memory that the compiler needs beside the tiles, for reductions and layout changes
SHARED_RESERVE = 18 * 1024


class Chip(NamedTuple):
    """What decides on block sizes: bytes of shared memory a program may have, and whether matrix units read their
    operands from there (Hopper and Blackwell), without which held tiles would take registers."""

    shared_memory: int
    operands_in_shared: bool


class Sizes(NamedTuple):
    """What of a problem decides on block sizes; two calls of a layer differ in little of it, so that lists of
    configurations are made once. Head sizes and number of keys are rounded up to powers of two, the latter so that a
    growing cache does not mean a new kernel a token."""

    dim: int
    value_dim: int
    itemsize: int
    max_span: int
    is_causal: bool
    num_keys: int

    @classmethod
    def of(cls, p: FocusProblem) -> "Sizes":
        head_sizes = (padded(p.query.shape[-1]), padded(p.value.shape[-1]))
        return cls(*head_sizes, p.query.element_size(), p.max_span, p.is_causal, _power_of_two(p.key.shape[2]))

    @property
    def operand_bytes(self) -> int:
        """Of a number in a product: three TF32 products need each in two parts."""
        return 8 if self.itemsize == 4 else 2


class Config(NamedTuple):
    """block_q queries against tiles of block_k keys, in `warps` warps; `resident`: K and V stay in shared memory."""

    block_q: int
    block_k: int
    warps: int
    resident: bool = False

    def tiles(self, sizes: Sizes) -> int:
        """Tiles that hold the widest band of a block of queries."""
        reach = sizes.max_span - 1
        band = self.block_q + (reach if sizes.is_causal else 2 * reach)
        return -(-min(band, max(sizes.num_keys, self.block_k)) // self.block_k)

    def options(self, sizes: Sizes, backward: bool = False) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        blocks = {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "num_warps": self.warps}
        if backward:
            return {**blocks, "num_stages": 1}
        return {**blocks, "TILES": self.tiles(sizes), "RESIDENT": self.resident, "num_stages": 1}

    def fits(self, sizes: Sizes, chip: Chip) -> bool:
        dim, value_dim = sizes.dim, sizes.value_dim
        band = self.tiles(sizes) * self.block_k
        if self.block_q * (band + 2 * dim + 3 * value_dim) > NUMBERS_PER_THREAD * 32 * self.warps:
            return False
        matrix = dim * value_dim
        if self.resident:
            held = (band * (dim + value_dim) + matrix) * sizes.itemsize
            return sizes.itemsize == 2 and chip.operands_in_shared and held + SHARED_RESERVE <= chip.shared_memory
        held = (matrix + self.block_q * max(dim, value_dim)) * sizes.operand_bytes
        return held + SHARED_RESERVE <= chip.shared_memory

    def fits_backward(self, sizes: Sizes, chip: Chip) -> bool:
        dim, value_dim = sizes.dim, sizes.value_dim
        tiles = (self.block_k + self.block_q) * (dim + value_dim) * 3 // 2
        fed_back = dim * value_dim + 2 * self.block_q * max(dim, value_dim)
        return max(tiles, fed_back) * sizes.operand_bytes + SHARED_RESERVE <= chip.shared_memory


# Best guess first. 64 queries are what a warp group multiplies at once; fewer for wide bands
FORWARD = (
    Config(64, 64, 4, resident=True),
    Config(64, 64, 8, resident=True),
    Config(128, 64, 8, resident=True),
    Config(64, 64, 8),
    Config(64, 32, 8),
    Config(32, 32, 4),
    Config(32, 32, 8),
    Config(16, 64, 4),
    Config(16, 32, 8),
)

# For heads of 64, 128 and 256 numbers of 16 bits
BACKWARD = (Config(64, 64, 4), Config(64, 64, 8), Config(32, 32, 8), Config(16, 32, 8))

# Triton's interpreter has no speed to tune for; small blocks give small problems several blocks and tiles
INTERPRETER = Config(16, 32, 4)


def padded(size: int) -> int:
    """A head size as the kernels hold it: a power of two, 16 at least."""
    return max(_power_of_two(size), 16)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@cache
def forward_configs(sizes: Sizes, chip: Chip) -> tuple[Config, ...]:
    """The configurations that fit, best guess first; empty if none does."""
    fitting = tuple(config for config in FORWARD if config.fits(sizes, chip))
    # Float32 kernels, with three products for one, take half a minute to compile: the first is taken unmeasured
    return fitting[: 1 if sizes.itemsize == 4 else 4]


@cache
def backward_config(sizes: Sizes, chip: Chip) -> Config | None:
    """Block sizes for backward, which is never measured: it adds into memory. None if nothing fits."""
    row = max(sizes.dim, sizes.value_dim) * sizes.itemsize
    first = 0 if row <= 128 else 1 if row <= 256 else 2
    return next((config for config in BACKWARD[first:] if config.fits_backward(sizes, chip)), None)


def decode_config(p: FocusProblem) -> dict[str, Any]:
    """Launch options for one query a sequence: tiles of about 8,192 numbers."""
    dim, value_dim = padded(p.query.shape[-1]), padded(p.value.shape[-1])
    block_k = max(min(8192 // max(dim, value_dim), _power_of_two(p.max_span)), 16)
    # F is held whole, at most 128 numbers a thread
    return {"BLOCK_K": block_k, "num_warps": max(4, dim * value_dim // 4096), "num_stages": 2}
