"""What the refiner is rewarded for, beside the seed's reward: how a gradient makes a lesson of what a pass did."""

import torch
from torch import Tensor


def saved_loss(grad: Tensor, *, scale: Tensor, predicted: Tensor, **entries: Tensor) -> dict[str, Tensor]:
    """The reward `"loss"`: what a correction saved, to first order: the loss at the predicted span minus the loss at
    the corrected one, in units of its mean size.

    Args:
        grad: of the loss by `scale`.
        scale, predicted: (...) share of the longest span with and without the correction.
        entries: of `Refiner.update`, without the reward.
    """
    valid = entries["valid"]
    # The size of gradients depends on the loss, the number of tokens and the loss scale; rewards must not
    unit = torch.where(valid, (grad * predicted).abs(), 0).sum() / valid.sum().clamp_min(1)
    return {**entries, "reward": grad * (predicted - scale) / unit.clamp_min(torch.finfo(unit.dtype).tiny)}


def weighed(grad: Tensor, *, rows: slice, valid: Tensor, **entries: Tensor) -> dict[str, Tensor]:
    """Of the reward `"mass"`: a query counts as much as the gradient of its output is large: one that the loss does
    not depend on teaches nothing.

    Args:
        grad: (B, H, T, Dv) of the loss by the local output.
        rows: the N queries that were looked at.
        valid: (B, H or 1, N) bool.
        entries: of `Refiner.update`.
    """
    size = grad[:, :, rows].float().norm(dim=-1).nan_to_num(0, 0, 0)
    if valid.shape[1] == 1:
        size = size.mean(dim=1, keepdim=True)
    # In the units of the loss scale, which the mean over a step's passes divides out
    return {**entries, "valid": size * valid}
