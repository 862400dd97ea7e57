"""A script that logs and never calls step_done. Usage: forgetful.py OUTPUT"""

import json
import sys
import time
from pathlib import Path

from trainctl.trainer import Run

with Run.attach("forgetful") as run, (Path(sys.argv[1]) / "rank-0.jsonl").open("w") as record:
    for number in range(1, 100_000):
        run.log(loss=1.0 / number)
        print(json.dumps({"step": number}), file=record, flush=True)
        time.sleep(0.01)
