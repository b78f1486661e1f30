"""Errors raised by hf_focus. Each names the argument, the value received and what would be accepted."""


class FocusError(Exception):
    """Base class: catching it catches everything that hf_focus raises on purpose."""


class FocusConfigError(FocusError, ValueError):
    """A setting has the wrong type, is out of range, or contradicts the model it is meant for."""


class UnsupportedArchitectureError(FocusError, ValueError):
    """The model's architecture is not declared, or its attention cannot be reached."""


class NoMatchingLayerError(FocusError, ValueError):
    """The layers asked for do not exist in the model."""


class AlreadyPatchedError(FocusError, ValueError):
    """`apply_focus` was called on a model that already carries FocusA."""


class NotPatchedError(FocusError, ValueError):
    """The call needs a model that carries FocusA, and this one does not."""


class FocusCheckpointError(FocusError, ValueError):
    """A checkpoint says that it carries FocusA, and its patch cannot be rebuilt from it."""


class FocusDataError(FocusError, ValueError):
    """A data file or data set is missing, empty or not of the expected form."""


class FocusResumeError(FocusError, ValueError):
    """A folder to resume from is no checkpoint, or belongs to another run."""


class FocusOutputError(FocusError, OSError):
    """Results cannot be written: the disk is full, or the folder read-only."""


class FocusInterruptedError(FocusError, RuntimeError):
    """A run was ended from outside. It can go on from its last checkpoint."""


class FocusHubError(FocusError, OSError):
    """The Hub cannot be reached, refuses the request, or holds under that name what it should not."""


def bad_value(argument: str, value: object, accepted: str) -> str:
    """The one form of every message on a bad value: what, what was received, what is accepted."""
    return f"`{argument}` got {value!r}; accepted: {accepted}."
