"""What a call of a patched attention layer is refused for, whichever way the call comes."""

from torch import Tensor, nn

from .errors import UnsupportedArchitectureError


def check_call(
    module: nn.Module, branch: nn.Module, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> None:
    """Refuse sizes that the branch was not built for, and attention to another sequence.

    Args:
        query, key, value: (B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv).

    Raises:
        UnsupportedArchitectureError: see above.
    """
    wanted = (branch.num_heads, branch.head_dim, branch.value_head_dim)
    given = (query.shape[1], query.shape[3], value.shape[3])
    if given != wanted:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} attends with (num_heads, head_dim, value_head_dim) = {given}, and FocusA was"
            f" built for {wanted}; name the right attributes with register_architecture. Heads that are split among"
            " devices (tensor parallelism) are not supported."
        )
    length, num_keys = query.shape[2], key.shape[2]
    # A prefix that sees all of itself: what is decoded after it comes with a cache
    cached = length < num_keys and getattr(module, "layer_idx", None) is not None
    if not is_causal and length != num_keys and not cached:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} attends from {length} to {num_keys} tokens: FocusA goes on self-attention;"
            " choose what to patch with FocusConfig(modules=…)."
        )
