"""What ends a run from outside: a request to stop, or the loss of another process."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.distributed import DistError

from .errors import FocusInterruptedError


@contextmanager
def watch_sigterm() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM has come, which inside the `with` ends nothing by itself.

    Signals reach the main thread alone: in another one, the answer is always no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    earlier = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, earlier)


@contextmanager
def name_lost_process() -> Iterator[None]:
    """Errors of the connection to another process become one that says what happened and how to go on.

    Raises:
        FocusInterruptedError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which begin with the place in its source
        if not (isinstance(error, DistError) or "gloo/transport" in str(error).partition("]")[0]):
            raise
        reason = str(error).strip().rpartition("\n")[2]
        raise FocusInterruptedError(
            f"another process of this run has stopped, or cannot be reached ({reason}). Start the run again with"
            " --resume latest: it goes on from the last checkpoint."
        ) from error
