"""A process that hangs does not hold the others forever."""

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
