"""The ways to compute focus attention: what each can do, and which one a call gets."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .blocked import differentiate, solve
from .errors import FocusConfigError, bad_value
from .problem import FocusOutput, FocusProblem
from .reference import focus_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to solve a `FocusProblem`.

    Args:
        name: what `focus_attention(backend=…)` calls it.
        solve: forward, without autograd if `differentiate` is given.
        differentiate: of a problem, the gradient of its output and the names of tensors, the gradients of these; None:
            autograd derives them from `solve`.
        devices: device types it runs on; None: all.
        dtypes: dtypes of query, key and value; None: all floating ones.
        max_head_dim: largest D and Dv; None: any.
        refusal: of a problem, and whether a gradient is wanted, why else it cannot run, or None.
    """

    name: str
    solve: Callable[[FocusProblem], FocusOutput]
    differentiate: Callable[[FocusProblem, Tensor, list[str]], dict[str, Tensor]] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_head_dim: int | None = None
    refusal: Callable[[FocusProblem, bool], str | None] = lambda problem, training: None

    def why_not(self, problem: FocusProblem) -> str | None:
        """Why it cannot solve `problem`, or None where it can."""
        query, head_dim = problem.query, max(problem.query.shape[-1], problem.value.shape[-1])
        if self.devices is not None and query.device.type not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, and the query is on {query.device.type}"
        if self.dtypes is not None and query.dtype not in self.dtypes:
            return f"it knows {', '.join(map(str, self.dtypes))}, and the query is {query.dtype}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"it knows head sizes up to {self.max_head_dim}, and this is {head_dim}"
        tensors = (getattr(problem, name) for name in FocusProblem.TENSORS)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return self.refusal(problem, training)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("blocked", solve, differentiate),
        Backend("reference", focus_reference),
    )
}
# What "auto" tries, in this order
AUTO = ("blocked",)


def choose(name: str, problem: FocusProblem) -> Backend:
    """The backend called `name`, or with `"auto"` the first that can solve `problem`.

    Raises:
        FocusConfigError: there is no such backend, or it cannot solve this problem.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise FocusConfigError(bad_value("backend", name, ", ".join(map(repr, ("auto", *BACKENDS)))))
        if (reason := BACKENDS[name].why_not(problem)) is not None:
            raise FocusConfigError(bad_value("backend", name, f"another one here: {reason}"))
        return BACKENDS[name]
    for candidate in AUTO:
        if (reason := BACKENDS[candidate].why_not(problem)) is None:
            return BACKENDS[candidate]
        if not torch.compiler.is_compiling():
            _tell(problem.query.device.type, candidate, reason)
    raise FocusConfigError(bad_value("backend", name, f"a problem that one of {AUTO} can solve: {reason}"))


@cache
def _tell(device: str, candidate: str, reason: str) -> None:
    # Once a reason. That a CPU has no kernel for GPUs is no news
    logger.log(logging.DEBUG if device == "cpu" else logging.WARNING, "backend %r not used: %s", candidate, reason)
