"""The ways to compute focus attention: what each can do, and which one a call gets."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .blocked import differentiate as differentiate_blocked
from .blocked import solve as solve_blocked
from .errors import FocusConfigError, bad_value
from .problem import FocusOutput, FocusProblem
from .reference import focus_reference
from .triton_backend import DTYPES, INTERPRETED, LARGEST_HEAD, refusal
from .triton_backend import differentiate as differentiate_fused
from .triton_backend import solve as solve_fused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to solve a `FocusProblem`.

    Args:
        name: what `focus_attention(backend=…)` calls it.
        solve: forward, without autograd if `differentiate` is given.
        differentiate: of a problem, the iterations that `solve` made, the gradient of the output and the names of
            tensors, the gradients of these; None: autograd derives them from `solve`.
        devices: device types it runs on; None: all.
        dtypes: dtypes of query, key and value; None: all floating ones.
        max_head_dim: largest D and Dv; None: any.
        refusal: of a problem, and whether a gradient is wanted, why else it cannot run, or None.
    """

    name: str
    solve: Callable[[FocusProblem], FocusOutput]
    differentiate: Callable[[FocusProblem, Tensor, Tensor, list[str]], dict[str, Tensor]] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_head_dim: int | None = None
    refusal: Callable[[FocusProblem, bool], str | None] = lambda problem, training: None

    def why_not(self, problem: FocusProblem, training: bool) -> str | None:
        """Why it cannot solve `problem`, with gradients if `training`; None where it can."""
        query, head_dim = problem.query, max(problem.query.shape[-1], problem.value.shape[-1])
        if self.devices is not None and query.device.type not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, and the query is on {query.device.type}"
        if self.dtypes is not None and query.dtype not in self.dtypes:
            return f"it knows {', '.join(map(str, self.dtypes))}, and the query is {query.dtype}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"it knows head sizes up to {self.max_head_dim}, and this is {head_dim}"
        return self.refusal(problem, training)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            solve_fused,
            differentiate_fused,
            dtypes=DTYPES,
            max_head_dim=LARGEST_HEAD,
            refusal=refusal,
        ),
        Backend("blocked", solve_blocked, differentiate_blocked),
        Backend("reference", focus_reference),
    )
}
# What "auto" tries, in this order
AUTO = ("triton", "blocked")


def is_training(problem: FocusProblem) -> bool:
    """Whether a gradient will be asked for."""
    tensors = (getattr(problem, name) for name in FocusProblem.TENSORS)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(name: str, problem: FocusProblem, training: bool) -> Backend:
    """The backend called `name`, or with `"auto"` the first that can solve `problem`.

    Raises:
        FocusConfigError: there is no such backend, or it cannot solve this problem.
    """
    check_name(name)
    if name != "auto":
        if (reason := BACKENDS[name].why_not(problem, training)) is not None:
            raise FocusConfigError(bad_value("backend", name, f"another one here: {reason}"))
        return BACKENDS[name]
    # The interpreter is for tests
    candidates = [BACKENDS[name] for name in AUTO if not (name == "triton" and INTERPRETED)]
    for candidate in candidates:
        if (reason := candidate.why_not(problem, training)) is None:
            return candidate
        _tell(problem.query.device.type, candidate.name, reason)
    raise FocusConfigError(bad_value("backend", name, f"a problem that one of {', '.join(AUTO)} can solve: {reason}"))


def check_name(name: str) -> None:
    """
    Raises:
        FocusConfigError: there is no such backend.
    """
    if name != "auto" and name not in BACKENDS:
        raise FocusConfigError(bad_value("backend", name, ", ".join(map(repr, ("auto", *BACKENDS)))))


@cache
def _tell(device: str, candidate: str, reason: str) -> None:
    # Once a reason. That a CPU has no kernel for GPUs is no news
    logger.log(logging.DEBUG if device == "cpu" else logging.WARNING, "backend %r not used: %s", candidate, reason)
