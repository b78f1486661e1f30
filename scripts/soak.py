"""Does the memory of a long run grow? Starts `finetune` on several processes, and measures each one's resident memory.

    python scripts/soak.py --minutes 60 --processes 2 --output-dir soak run.yaml --cpu --max-steps 1000000

Everything but --minutes, --processes and --interval goes to `finetune`, which is ended by SIGTERM. Samples go to
soak.jsonl in --output-dir as they are taken. Prints, for each process, mebibytes at the end and the slopes of straight
lines, in mebibytes an hour: through all but the first fifth, and through the last half.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm.auto import tqdm

FINETUNE = Path(__file__).with_name("finetune.py")
# Name of a slope -> the share of the samples before it
SLOPES = {"slope_per_hour": 0.2, "slope_per_hour_last_half": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--output-dir", type=Path, required=True, help="of finetune; the samples go there too")
    args, flags = parser.parse_known_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes), str(FINETUNE)]
    launcher = psutil.Popen([sys.executable, *launch, *flags, "--output-dir", str(args.output_dir)])
    samples: dict[int, list[dict[str, Any]]] = {}
    begun = time.monotonic()
    try:
        with (args.output_dir / "soak.jsonl").open("w", encoding="utf-8", buffering=1) as file:
            for _ in tqdm(range(int(args.minutes * 60 / args.interval)), desc="Sampling"):
                time.sleep(args.interval)
                if launcher.poll() is not None:
                    break
                for worker in launcher.children():
                    hours, memory = (time.monotonic() - begun) / 3600, worker.memory_info().rss / 2**20
                    sample = {
                        "process": worker.pid,
                        "step": last_step(args.output_dir),
                        "hours": hours,
                        "mebibytes": memory,
                    }
                    samples.setdefault(worker.pid, []).append(sample)
                    file.write(json.dumps(sample) + "\n")
    finally:
        launcher.terminate()
        try:
            launcher.wait(120)
        except psutil.TimeoutExpired:
            launcher.kill()
    for pid, taken in samples.items():
        end = {name: taken[-1][name] for name in ("step", "hours", "mebibytes")}
        slopes = {name: slope(taken[int(share * len(taken)) :]) for name, share in SLOPES.items()}
        print(json.dumps({"process": pid, "samples": len(taken), **end, **slopes}))
    return 0


def last_step(output_dir: Path) -> int:
    """The last step in the log of the run, which may not have begun."""
    log = output_dir / "train_log.jsonl"
    if not log.is_file() or not log.stat().st_size:
        return 0
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 4096, 0))
        whole = file.read().rpartition(b"\n")[0]
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


def slope(samples: list[dict[str, Any]]) -> float | None:
    """Of memory over time, in mebibytes an hour."""
    if len(samples) < 2:
        return None
    return float(
        np.polyfit([sample["hours"] for sample in samples], [sample["mebibytes"] for sample in samples], 1)[0]
    )


if __name__ == "__main__":
    sys.exit(main())
