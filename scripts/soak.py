"""Does the memory of a long run grow? Starts `finetune` on several processes, and measures each one's resident memory.

    python scripts/soak.py --minutes 60 --processes 2 run.yaml --cpu --max-steps 1000000

Everything but --minutes, --processes and --interval goes to `finetune`, which is ended by SIGTERM. Prints, for each
process, mebibytes at the end and the slope of a straight line through all but the first fifth, in mebibytes an hour.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from tqdm.auto import tqdm

FINETUNE = Path(__file__).with_name("finetune.py")
WARM_UP = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between samples")
    args, flags = parser.parse_known_args()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes), str(FINETUNE)]
    launcher = psutil.Popen([sys.executable, *launch, *flags])
    samples: dict[int, list[tuple[float, float]]] = {}
    try:
        for _ in tqdm(range(int(args.minutes * 60 / args.interval)), desc="Sampling"):
            time.sleep(args.interval)
            if launcher.poll() is not None:
                break
            for worker in launcher.children():
                memory = worker.memory_info().rss / 2**20
                samples.setdefault(worker.pid, []).append((time.monotonic() / 3600, memory))
    finally:
        launcher.terminate()
        try:
            launcher.wait(120)
        except psutil.TimeoutExpired:
            launcher.kill()
    for pid, taken in samples.items():
        hours, memory = np.array(taken[int(WARM_UP * len(taken)) :]).T
        slope = float(np.polyfit(hours, memory, 1)[0]) if len(hours) > 1 else None
        print(json.dumps({"process": pid, "samples": len(taken), "mebibytes": memory[-1], "slope_per_hour": slope}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
