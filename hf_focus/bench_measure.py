"""How the benchmark measures: interleaved timing, and peak memory."""

import ctypes
import gc
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from .bench_cases import Call, Case
from .bench_focus import contenders

# Shorter calls are repeated within a timing until they last this long, in seconds
SHORTEST = 0.02
# Share of the free memory that a run may take before a contender fails instead of the machine
MEMORY_SHARE = 0.9


@dataclass
class Timing:
    """Seconds of one call in each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Median over the rounds of this one's time over the other's in the same round: what slows the machine for a
        while slows both."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int,
    shortest: float = SHORTEST,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time calls against each other: each is warmed up twice; then in each round every one runs once, and each round
    begins with another one. A call that fails is left out.

    Args:
        calls: by name.
        device: "cpu", or "cuda", timed by its events.
        rounds: how many.
        shortest: seconds that one timing lasts at least; quicker calls are repeated and averaged.
        on_round: called after each round.

    Returns:
        Timings of the calls that ran, and what the others failed with.
    """
    failed: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            _time(call, 1, device)
            repeats[name] = min(max(1, math.ceil(shortest / max(_time(call, 1, device), 1e-7))), 1000)
        except Exception as error:
            failed[name] = describe(error)
            release()
    timings = {name: Timing() for name in repeats}
    names = list(repeats)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            begin = number % max(len(names), 1)
            for name in (*names[begin:], *names[:begin]):
                if name not in failed:
                    try:
                        timings[name].seconds.append(_time(calls[name], repeats[name], device))
                    except Exception as error:
                        failed[name] = describe(error)
                        release()
            on_round()
    finally:
        gc.enable()
    return {name: timing for name, timing in timings.items() if name not in failed}, failed


def _time(call: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cpu":
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begun) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def describe(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"


def release() -> None:
    """Give back what is no longer used, to the device and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(case: Case, names: Sequence[str], iterations: Sequence[int]) -> dict[str, int | str]:
    """Bytes that one call of each contender needs above what was there before it, inputs included.

    On a GPU: `max_memory_allocated`. On a CPU: each in a process of its own, which was never used for anything else;
    the largest resident set during the call above the resident set before it, after a short call has brought in the
    code. A process inherits its server's pages, which are shared and in both figures.

    Returns:
        Bytes, or why there are none.
    """
    if case.device != "cpu":
        return {name: _guarded(lambda name=name: _peak(case, name, iterations)) for name in names}
    methods = multiprocessing.get_all_start_methods()
    # A server that only imports, and then forks: a new process costs a tenth of a second instead of ten
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    threads = torch.get_num_threads()

    def in_process(name: str) -> int:
        # One pool each: a process that the system kills takes its pool with it
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_peak, case, name, iterations, threads).result()

    return {name: _guarded(lambda name=name: in_process(name)) for name in names}


def _guarded(measure: Callable[[], int]) -> int | str:
    try:
        return measure()
    except Exception as error:
        return describe(error)


def _peak(case: Case, name: str, iterations: Sequence[int], threads: int | None = None) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    contender = {contender.name: contender for contender in contenders(iterations)}[name]
    contender.build(replace(case, length=min(case.length, 2 * case.span))).run()
    call = contender.build(case)
    if case.device == "cpu":
        return _peak_on_cpu(call)
    call.run()
    release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Call) -> int:
    release()
    with suppress(OSError):
        # Linux: the largest resident set counts from here. A process never used before does without
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call.run()
    return max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    """Resident memory of this process in bytes: `VmRSS` now, `VmHWM` the largest so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    # Elsewhere only the largest so far is known; before the call it is what was needed to get there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Inside, on Linux, what asks for more memory than is free fails, instead of the system ending the process."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        yield
        return
    free = next(int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvail"))
    data = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data + int(MEMORY_SHARE * free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
