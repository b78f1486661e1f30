"""Programs in new processes that have imported transformers and not hf_focus; forked from one, which imports."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

SERVER = """
import json, os, signal, sys
import torch, transformers.modeling_utils, transformers.models.auto.modeling_auto
assert "hf_focus" not in sys.modules
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(asked["files"], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(asked["environment"])
        sys.argv = asked["argv"]
        exec(asked["program"])
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Bare:
    """Runs programs, one after the other, each with empty caches of the Hub."""

    def __init__(self, folder: Path, process: Popen[str]) -> None:
        self.folder, self.process = folder, process

    def run(self, program: str, *arguments: object, **environment: str) -> CompletedProcess[str]:
        """As `python -c` would run it. Modules of the tests can be imported."""
        files = [self.folder / name for name in ("stdout", "stderr")]
        argv = ["-c", *map(str, arguments)]
        asked = {"program": program, "argv": argv, "files": list(map(str, files)), "environment": environment}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        shutil.rmtree(self.folder / "home", ignore_errors=True)
        return CompletedProcess(argv, code, *(file.read_text(encoding="utf-8") for file in files))


@contextmanager
def serve(folder: Path) -> Iterator[Bare]:
    """The process from which the others are forked, while the `with` lasts. Kernels are compiled there, not
    interpreted."""
    given: dict[str, Any] = {"HF_HOME": folder / "home", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    given["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    with Popen([sys.executable, "-c", SERVER], stdin=PIPE, stdout=PIPE, text=True, env=environment) as process:
        yield Bare(folder, process)
        process.stdin.close()
