"""The layer's own way from a head's output back to its query: what it writes into the stream, and reads from it."""

import torch
from torch import Tensor, nn

from .errors import FocusConfigError, bad_value

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The first name found on the attention module is taken
QUERY = ("q_proj", "query", "q_lin", "q")
OUTPUT = ("o_proj", "out_proj", "out_lin", "o", "out")


def find_projections(module: nn.Module, num_heads: int, head_dim: int, value_head_dim: int) -> tuple[Tensor, Tensor]:
    """Weights of an attention module's query and output projections, with what active LoRA adapters add to them.

    Returns:
        (H·D, width) and (width, H·Dv).

    Raises:
        FocusConfigError: the module has no such projections of its own: they are fused, quantized, or elsewhere.
    """
    query, output = (_weight(module, names) for names in (QUERY, OUTPUT))
    rows, columns = num_heads * head_dim, num_heads * value_head_dim
    fits = query is not None and output is not None and query.ndim == output.ndim == 2
    fits = fits and query.dtype in _PLAIN and output.dtype in _PLAIN
    if not fits or query.shape[0] != rows or output.shape[1] != columns or query.shape[1] != output.shape[0]:
        accepted = (
            f"'features' for {type(module).__name__}: 'layer' needs a query projection ({' or '.join(QUERY)}) with"
            f" weight ({rows}, width) and an output projection ({' or '.join(OUTPUT)}) with weight (width, {columns}),"
            " neither quantized nor wrapped by PEFT (but for LoRA without DoRA); fold_feedback(model) before you"
            " quantize keeps what was trained"
        )
        raise FocusConfigError(bad_value("feedback_through", "layer", accepted))
    return query, output


def through_layer(module: nn.Module, num_heads: int, head_dim: int, value_head_dim: int) -> Tensor:
    """W_O · W_Q of each head, (H, Dv, D): what the query projection makes of what the output projection writes for a
    head (the Q-composition of Elhage et al. 2021, of a head with itself). Biases, norms, gates and position encodings
    that a model has on this way are left out.

    Float32 (bfloat16 under its autocast), or float64 where the weights are that; differentiable with respect to both.

    Raises:
        FocusConfigError: see `find_projections`; or the weights are offloaded.
    """
    query, output = find_projections(module, num_heads, head_dim, value_head_dim)
    if query.is_meta or output.is_meta:
        accepted = "'features' while weights are offloaded: fold_feedback(model) before you offload it"
        raise FocusConfigError(bad_value("feedback_through", "layer", accepted))
    dtype = torch.promote_types(query.dtype, torch.float32)
    reads = query.to(dtype).unflatten(0, (num_heads, head_dim))
    writes = output.to(dtype).unflatten(1, (num_heads, value_head_dim))
    # As a product of matrices a head: (H, Dv, width) · (H, width, D)
    return writes.permute(1, 2, 0) @ reads.transpose(1, 2)


def _weight(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(weight, Tensor):
            return _with_lora(projection, weight)
    return None


def _with_lora(projection: nn.Module, weight: Tensor) -> Tensor | None:
    """The weight that a projection wrapped by PEFT acts with, as merging would make it; None: it cannot be told."""
    if not hasattr(projection, "base_layer") or projection.merged or projection.disable_adapters:
        return weight
    if not hasattr(projection, "lora_A"):
        return None
    adapters = [name for name in projection.active_adapters if name in projection.lora_A]
    if any(projection.use_dora.get(name, False) for name in adapters):
        return None
    return weight + sum(projection.get_delta_weight(name).to(weight.dtype) for name in adapters)


def layer_feedback(module: nn.Module, branch: nn.Module) -> Tensor | None:
    """`through_layer` of an attention module, where its branch asks for it; else None."""
    if branch.config.feedback_through != "layer" or branch.config.max_iterations == 1:
        return None
    return through_layer(module, branch.num_heads, branch.head_dim, branch.value_head_dim)
