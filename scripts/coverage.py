#!/usr/bin/env python3
"""Check every model type that transformers has, and write the table of what works: patches/COVERAGE.md.

python scripts/coverage.py                        # all of them, some ten minutes; stopped, it goes on where it was
python scripts/coverage.py --types llama t5       # these only, printed
python scripts/coverage.py --compare old.json     # what differs from another run, with another transformers
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "patches" / "COVERAGE.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="only these model types; prints, writes no page")
    parser.add_argument(
        "--results", type=Path, help="JSON lines of what was checked so far (default: in the temporary folder)"
    )
    parser.add_argument("--compare", type=Path, metavar="RESULTS", help="results of another run: print what differs")
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds of computing for one model type (default: 90)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was checked so far")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table goes (default: patches/COVERAGE.md)")
    arguments = parser.parse_args()

    from transformers import __version__

    from hf_focus.support import auto_model_types

    types = arguments.types or sorted(auto_model_types())
    results = arguments.results or Path(tempfile.gettempdir()) / f"hf_focus-coverage-{__version__}.jsonl"
    if arguments.fresh or arguments.types:
        done: dict[str, Any] = {}
        results = None if arguments.types else results
        if results is not None:
            results.unlink(missing_ok=True)
    else:
        done = read_results(results)
    check_all([name for name in types if name not in done], done, results, arguments.limit)
    if arguments.types:
        print(json.dumps([done[name] for name in types], indent=1, ensure_ascii=False))
    elif arguments.compare:
        print("\n".join(compare(read_results(arguments.compare), done)) or "nothing differs")
    else:
        from coverage_page import page

        arguments.page.write_text(page([done[name] for name in types], __version__), encoding="utf-8")
        print(f"Wrote {arguments.page}")
    return 0


def read_results(file: Path) -> dict[str, Any]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {entry["model_type"]: entry for entry in map(json.loads, lines)}


def check_all(types: list[str], done: dict[str, Any], results: Path | None, limit: float) -> None:
    """Check each in a process of its own kind: one that hangs or dies is replaced, and its model type reported so."""
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    worker = None
    for name in tqdm(types, unit="type"):
        if worker is None:
            worker = Worker(context)
        entry = worker.check(name, limit)
        if entry is None:
            entry = {"model_type": name, "status": "not run", "reason": worker.why, "properties": {}}
            worker = None
        done[name] = entry
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if worker is not None:
        worker.stop()


class Worker:
    """A process that checks one model type after the other."""

    def __init__(self, context: Any) -> None:
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.why = ""

    def check(self, name: str, limit: float) -> dict[str, Any] | None:
        import psutil

        self.ours.send(name)
        try:
            used = psutil.Process(self.process.pid).cpu_times
            # Of computing, and not of waiting for a busy machine; the first answer also waits for the imports
            end, last = sum(used()[:2]) + limit + 15, time.monotonic() + 20 * limit
            while sum(used()[:2]) < end and time.monotonic() < last:
                if self.ours.poll(1):
                    return self.ours.recv()
            self.why = f"it took longer than {limit:.0f} seconds"
        except (EOFError, psutil.Error):
            self.why = "the process died, most likely of too little memory"
        self.stop()
        return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Any) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch
    import transformers
    from coverage_checks import check_model_type

    with suppress(ImportError):
        import resource

        # A tiny config that is not tiny must not take the machine with it
        resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    while True:
        pipe.send(check_model_type(pipe.recv()).to_dict())


def compare(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    """A line for each model type that is new, gone, or whose outcome changed."""
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield f"{name}: {'only in the new run' if name in new else 'only in the old run'}"
            continue
        before = {**old[name]["properties"], "status": old[name]["status"]}
        after = {**new[name]["properties"], "status": new[name]["status"]}
        for key in sorted(before.keys() | after.keys()):
            if before.get(key, "")[:3] != after.get(key, "")[:3]:
                yield f"{name}: {key}: {before.get(key)} -> {after.get(key)}"


if __name__ == "__main__":
    raise SystemExit(main())
