"""Evidence for what FocusA claims: small models with and without it, on tasks that test each claim.

    python scripts/evidence.py --quick                   # a little of everything, under ten minutes on two cores
    python scripts/evidence.py                           # all rows (days on two cores); stop and start again at will
    python scripts/evidence.py k-step-3 --minutes 60     # one table, for an hour
    python scripts/evidence.py --dataset book.txt text-equal-flops   # other text: a file or a data set of the Hub
    python scripts/evidence.py --map                     # pictures of spans, attention and refiner, on real text
    python scripts/evidence.py --report                  # only the report, from the results that there are

Results go to scripts/evidence/results, one JSON object a row, the page to scripts/evidence/REPORT.md; those of --quick
and of other text to folders of their own in outputs/. Needs hf_focus[evidence].
"""

import sys
from pathlib import Path

from hf_focus.evidence_cli import main

if __name__ == "__main__":
    main(description=__doc__, folder=Path(__file__).parent / "evidence")
    sys.exit(0)
