"""`log = run.log`, kept by a script: in a forked worker and after the run's end it fills no memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

from jobs import end_tree

SCRIPT = """
import json, os, sys
from trainctl.trainer import Run

run = Run.attach("kept")
log, step_done = run.log, run.step_done
log(loss=1.0)
step_done()
reader, writer = os.pipe()
worker = os.fork()
if worker == 0:
    before = len(run._buffer)
    for _ in range(100):
        log(loss=2.0)
        run.log(loss=2.0)
        log(name="a string")
        step_done()
    os.write(writer, json.dumps(len(run._buffer) - before).encode())
    os._exit(0)
os.waitpid(worker, 0)
log(loss=3.0)
step_done()
run.close()
before = len(run._buffer)
for _ in range(100):
    log(too_late=4.0)
    step_done()
print(json.dumps({"in the worker": int(os.read(reader, 100)), "after the end": len(run._buffer) - before}))
"""


def test_nothing_waits_in_a_forked_worker_or_after_the_runs_end(tmp_path: Path) -> None:
    environment = os.environ | {"TRAINCTL_RUN_DIR": str(tmp_path / "run")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        told, said = process.communicate(timeout=60)
    finally:
        end_tree(process)
    assert process.returncode == 0, said
    assert json.loads(told) == {"in the worker": 0, "after the end": 0}
    assert said.count("run.log() was called after run.close(): too_late and what follows is not recorded") == 1
