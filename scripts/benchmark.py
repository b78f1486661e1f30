"""Speed and memory of FocusA: its local attention against others', one decode step, and whole models.

    python scripts/benchmark.py --quick                          # everything at tiny sizes, under two minutes
    python scripts/benchmark.py --output outputs/benchmark       # the full run; stop it and start it again at will
    python scripts/benchmark.py --suite op --lengths 4096 --only 'focus*' 'FlexAttention'

Contenders of one size are timed in turns, round by round, so that their ratios hold on a machine that is not quiet.
The folder gets a CSV file and a picture for each suite, and report.md with all tables and the targets.
"""

from hf_focus.bench_run import main

if __name__ == "__main__":
    main(description=__doc__)
