"""Block sizes of the fused kernels: a short list, cut down to what fits on the chip for a given problem."""

from typing import Any, NamedTuple

from .problem import FocusProblem

# Float32 numbers that a thread can hold of the band's scores, of the 255 registers it has
SCORES_PER_THREAD = 160
# Static shared memory that the compiler needs beside the tiles, for reductions and layout changes
SHARED_RESERVE = 18 * 1024


class Config(NamedTuple):
    """block_q queries against tiles of block_k keys, in `warps` warps; `resident`: K and V stay in shared memory."""

    block_q: int
    block_k: int
    warps: int
    resident: bool = False

    def tiles(self, p: FocusProblem) -> int:
        """Tiles that hold the widest band of a block of queries."""
        reach = p.max_span - 1
        band = self.block_q + (reach if p.is_causal else 2 * reach)
        # Rounded up, so that a growing cache does not mean a new kernel a token
        return -(-min(band, max(_power_of_two(p.key.shape[2]), self.block_k)) // self.block_k)

    def options(self, p: FocusProblem, backward: bool = False) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        blocks = {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "num_warps": self.warps}
        if backward:
            return {**blocks, "num_stages": 1}
        return {**blocks, "TILES": self.tiles(p), "RESIDENT": self.resident, "num_stages": 1}

    def fits(self, p: FocusProblem, shared_memory: int) -> bool:
        band = self.tiles(p) * self.block_k
        if self.block_q * band > SCORES_PER_THREAD * 32 * self.warps:
            return False
        width, itemsize = padded(p.query.shape[-1]) + padded(p.value.shape[-1]), p.query.element_size()
        if self.resident:
            held = band * width + padded(p.query.shape[-1]) * padded(p.value.shape[-1])
            # Only the wide matrix units of 16-bit types read their operands from shared memory
            return itemsize == 2 and held * itemsize + SHARED_RESERVE <= shared_memory
        return (self.block_k + self.block_q) * width * itemsize + SHARED_RESERVE <= shared_memory


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

# Triton's interpreter has no speed to tune for; small blocks give small problems several blocks and tiles
INTERPRETER = Config(16, 32, 4)


def padded(size: int) -> int:
    """A head size as the kernels hold it: a power of two, 16 at least."""
    return max(_power_of_two(size), 16)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def forward_configs(p: FocusProblem, shared_memory: int) -> list[Config]:
    """The configurations that fit, best guess first; empty if none does."""
    return [config for config in FORWARD if config.fits(p, shared_memory)][:4]


def backward_config(p: FocusProblem) -> Config:
    """Block sizes for backward, which is never measured: it adds into memory."""
    widest = max(padded(p.query.shape[-1]), padded(p.value.shape[-1]))
    if widest * p.query.element_size() <= 128:
        return Config(64, 64, 4)
    if widest * p.query.element_size() <= 256:
        return Config(64, 64, 8)
    return Config(32, 32, 8) if widest * p.query.element_size() <= 512 else Config(16, 32, 8)


def decode_config(p: FocusProblem) -> dict[str, Any]:
    """Launch options for one query a sequence: tiles of about 8,192 numbers."""
    dim, value_dim = padded(p.query.shape[-1]), padded(p.value.shape[-1])
    block_k = max(min(8192 // max(dim, value_dim), _power_of_two(p.max_span)), 16)
    # F is held whole, at most 128 numbers a thread
    return {"BLOCK_K": block_k, "num_warps": max(4, dim * value_dim // 4096), "num_stages": 2}
