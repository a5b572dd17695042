"""A process that hangs, dies or stops does not hold the others, and the run ends with the cause."""

import os
import sys

import pytest
from conftest import ENVIRONMENT, run_program

HANGING = """
import sys, time
from detectron2.utils import comm
from torch import nn, ones
from dsrcnn.engine.main import exit_status
from dsrcnn.engine.processes import Processes, run_processes, wrap_ddp

def work():
    model = wrap_ddp(nn.Linear(2, 2))
    if comm.get_rank() == 1:
        time.sleep(600)
    model(ones(1, 2)).sum().backward()

if __name__ == "__main__":
    sys.exit(exit_status(lambda: run_processes(Processes("cpu", 2, timeout=3.0), work)))
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_timeout(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.curdir}
    printed = run_program(sys.executable, script, status=2, env=environment, timeout=120)
    assert printed.count("error: ") == 1
    assert "has not answered for 3 seconds (DISTRIBUTED_TIMEOUT)" in printed
    assert "Traceback" not in printed


ENDING = """
import os, signal, sys
from detectron2.utils import comm
from dsrcnn.engine.interrupt import StopSignals
from dsrcnn.engine.processes import Processes, run_processes
from dsrcnn.errors import TrainingInterrupted

def stop():
    raise TrainingInterrupted(signal.SIGTERM, "The state is saved.")

def stop_at_signal():
    signals = StopSignals()
    with signals.handled():
        comm.synchronize()
        assert signals.wait(60)
    stop()

def work(end):
    rank = comm.get_rank()
    if rank == 0 and end in ("killed", "raises"):
        stop_at_signal()
    comm.synchronize()
    if end == f"{rank} stops":
        stop()
    elif end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "raises":
        raise ValueError("a defect")
    comm.synchronize()  # the other process has left

if __name__ == "__main__":
    try:
        run_processes(Processes("cpu", 2), work, sys.argv[1])
    except Exception as error:
        print(type(error).__name__, getattr(error, "signal", ""), str(error).splitlines()[-1])
"""


@pytest.mark.parametrize(("end", "expected"), [
    ("killed", "ProcessExitedException  process 1 terminated with signal SIGKILL"),
    ("raises", "ProcessRaisedException  ValueError: a defect"),
    ("0 stops", "TrainingInterrupted 15 The state is saved."),
    ("1 stops", "TrainingInterrupted 15 Interrupted by SIGTERM. --resume continues from the last "
     "checkpoint."),
])  # fmt: skip
def test_a_run_ends_with_what_happened_first(tmp_path, end, expected):
    """Torch ends the other processes by SIGTERM, which is no signal to the run."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.curdir}
    printed = run_program(sys.executable, script, end, env=environment, timeout=120)
    assert printed.splitlines()[-1] == expected
