"""All iterations of focus over one cell, backward."""

import torch
from torch import Tensor

from .cell_forward import CellTensors, Scaled, Trace


def differentiate_cell(c: CellTensors, trace: Trace, grad: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the gradients of one solved cell to `sums`.

    Args:
        trace: what `solve_cell` left.
        grad: of the cell's output, (B, H, T, Dv).
        sums: the cell's part of each gradient that is wanted, by name, in the compute dtype.
    """
    p, steps = c.p, len(trace.outputs)
    attention = _AttentionGradient(c, trace, sums)
    feedback = _FeedbackGradient(c, trace, sums)
    carried = None
    for step in reversed(range(steps)):
        output, running = trace.outputs[step], trace.running[step]
        grad_output = carried
        if p.readout_weights is not None:
            # The last output stood for the iterations that were not made
            made = slice(step, None if step == steps - 1 else step + 1)
            share = p.readout_weights[..., made].to(grad.dtype).sum(-1, keepdim=True)
            grad_output = grad * share if carried is None else torch.addcmul(carried, grad, share)
            if "readout_weights" in sums:
                sums["readout_weights"][..., made].add_(c.dot(grad, output))
        elif carried is None:
            grad_output = grad
        carried = None
        if running is not None:
            # A stopped query repeated the output before
            active = grad_output * running[..., None]
            grad_output, carried = active, grad_output - active
        grad_rows = attention(step, grad_output)
        if step > 0:
            grad_previous = feedback(grad_rows, step - 1)
            carried = grad_previous if carried is None else carried.add_(grad_previous)
    feedback.finish(grad_rows)
    attention.finish()


class _AttentionGradient:
    """From an output to the rows of its product; keys, values, biases, and the sharpness behind a soft cap."""

    def __init__(self, c: CellTensors, trace: Trace, sums: dict[str, Tensor]) -> None:
        self.c, self.trace, self.sums = c, trace, sums
        self.cell_sums: dict[str, Tensor] = {}
        self.total: Tensor | None = None

    def __call__(self, step: int, grad_output: Tensor) -> Tensor:
        c, trace, sums = self.c, self.trace, self.sums
        weights, rows = trace.weights[step], c.by_group(trace.rows[step])
        grad = c.by_group(grad_output)
        grad_scores = torch.bmm(grad, c.value.transpose(1, 2), out=self.c.buffers("grad_scores", *weights.shape))
        if trace.outputs[step] is None:
            grad_scores.mul_(weights).addcmul_(weights, grad_scores.sum(-1, keepdim=True), value=-1)
        else:
            grad_scores.sub_(c.by_group(c.dot(grad_output, trace.outputs[step]))).mul_(weights)
        if "value" in sums:
            self._add("value", weights, grad)
        if "span" in sums or "position_bias" in sums:
            if self.total is None:
                self.total = self.c.buffers("grad_bias", *weights.shape).copy_(grad_scores)
            else:
                self.total.add_(grad_scores)
        if c.cap is not None:
            capped = trace.capped[step]
            if "sharpness" in sums:
                cap_grad = (grad_scores * capped).sum(-1).view(c.shape) * c.p.softcap
                sums["sharpness"].add_(cap_grad.sum_to_size(sums["sharpness"].shape))
            grad_scores.mul_(1 - capped.square()).mul_(c.cap / c.p.softcap)
        if "key" in sums:
            self._add("key", grad_scores, rows)
        return torch.bmm(grad_scores, c.key).view(c.query.shape)

    def _add(self, name: str, left: Tensor, right: Tensor) -> None:
        """Sums of a cell's own, which are contiguous: products that add into strided memory are slow."""
        total = self.c.buffers(f"grad_{name}", left.shape[0], left.shape[2], right.shape[2])
        if name in self.cell_sums:
            total.baddbmm_(left.transpose(1, 2), right)
        else:
            self.cell_sums[name] = torch.bmm(left.transpose(1, 2), right, out=total)

    def finish(self) -> None:
        for name, total in self.cell_sums.items():
            self.sums[name].add_(total.view(self.sums[name].shape))
        if self.total is None:
            return
        total = self.total.view(*self.c.shape, -1)
        if "position_bias" in self.sums:
            self.sums["position_bias"].add_(total.sum_to_size(self.sums["position_bias"].shape))
        if "span" in self.sums:
            # On the edge m = (ramp + z − d)/ramp, and d(log m)/dz = 1/(ramp·m); elsewhere m is flat
            weight = self.c.shared.edge(self.c.p).add_(1)
            slope = total.div_(weight).masked_fill_((weight <= 0) | (weight > 1), 0).sum(-1).div_(self.c.p.ramp)
            self.sums["span"].add_(slope.sum_to_size(self.sums["span"].shape))


class _FeedbackGradient:
    """From the rows of a product back to the output that was fed into them, and to the first query."""

    def __init__(self, c: CellTensors, trace: Trace, sums: dict[str, Tensor]) -> None:
        self.c, self.trace, self.sums = c, trace, sums
        self.normalized = c.p.feedback == "normalized"
        self.grad_first: Tensor | None = None
        self.grad_direction: Tensor | None = None
        self.grad_fold = self.grad_size = 0

    def __call__(self, grad_rows: Tensor, step: int) -> Tensor:
        """Gradient of the rows after `step` -> gradient of the output of `step`, (B, H, T, Dv)."""
        c, fed = self.c, self.trace.fed[step]
        from_first = c.p.anchored or step == 0
        base = c.first if from_first else self.trace.fed[step - 1].direction
        vector = fed.direction.vector
        along = c.dot(grad_rows, vector)
        if self.normalized:
            inverse = fed.direction.inverse_size
            self.grad_size = self.grad_size + along * inverse
            grad_vector = grad_rows * (c.size * c.gain * c.fold)
            if self.grad_direction is not None:
                grad_vector.add_(self.grad_direction)
            grad_vector = _unit_gradient(grad_vector, fed.direction, c.dot(grad_vector, vector))
            with_fed = c.dot(grad_vector, fed.output.vector)
            if "mix" in self.sums:
                with_base = c.dot(grad_vector, base.vector) * base.inverse_size
                self.sums["mix"].add_((with_fed * fed.output.inverse_size - with_base).sum((0, 2, 3)))
            grad_fed = _unit_gradient(grad_vector, fed.output, with_fed).mul_(c.mix)
            grad_base = grad_vector.mul_(1 - c.mix)
        else:
            self.grad_fold = self.grad_fold + along
            grad_fed = grad_rows * c.fold
            if self.grad_direction is not None:
                grad_fed.add_(self.grad_direction)
            grad_base = grad_fed
        if from_first:
            self.grad_first = grad_base if self.grad_first is None else self.grad_first + grad_base
            self.grad_direction = None
        else:
            self.grad_direction = grad_base
        return self._through_matrix(grad_fed, self.trace.outputs[step])

    def _through_matrix(self, grad_fed: Tensor, output: Tensor) -> Tensor:
        c = self.c
        if c.p.rotation is not None:
            grad_fed = c.rotate(grad_fed, c.buffers("straight", *grad_fed.shape), back=True)
        if c.matrix is None:
            missing = output.shape[-1] - grad_fed.shape[-1]
            return torch.nn.functional.pad(grad_fed, (0, missing)) if missing >= 0 else grad_fed[..., :missing]
        if "feedback_matrix" in self.sums:
            grad = torch.bmm(output.flatten(0, 1).transpose(1, 2), grad_fed.flatten(0, 1))
            self.sums["feedback_matrix"].add_(grad.view(c.shape[0], c.shape[1], *grad.shape[1:]).sum(0))
        return torch.bmm(grad_fed.flatten(0, 1), c.matrix.transpose(1, 2)).view(output.shape)

    def finish(self, grad_rows: Tensor) -> None:
        """Gradients of the first query and of what scales the rows; `grad_rows` are the first product's."""
        c, sums = self.c, self.sums
        grad_fold = c.dot(grad_rows, c.query) + self.grad_fold
        grad_query = grad_rows * c.fold
        if self.normalized and self.grad_first is not None:
            grad_fold = grad_fold + self.grad_size * c.size * c.gain
            if "gain" in sums:
                sums["gain"].add_((self.grad_size * c.size * c.fold).sum((0, 2, 3)))
            grad_query.add_(_unit_gradient(self.grad_first, c.first, c.dot(self.grad_first, c.query)))
            slope = self.grad_size * c.gain * c.fold / c.size / c.query.shape[-1]
            grad_query.addcmul_(c.query, slope)
        elif self.grad_first is not None:
            grad_query.add_(self.grad_first)
        if "query" in sums:
            sums["query"].copy_(grad_query)
        if "sharpness" in sums and c.cap is None:
            grad = grad_fold.squeeze(-1) * c.p.scaling
            sums["sharpness"].add_(grad.sum_to_size(sums["sharpness"].shape))


def _unit_gradient(grad: Tensor, x: Scaled, along: Tensor) -> Tensor:
    """Through `iteration.unit`, y = x·c: c·(∂y − y·mean(y·∂y)); `along` is the scalar product of `grad` and x."""
    scale = along * x.inverse_size**3 / grad.shape[-1]
    return torch.mul(grad, x.inverse_size).addcmul_(x.vector, scale, value=-1)
