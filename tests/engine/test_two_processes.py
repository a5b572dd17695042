"""Two gloo processes on the CPU: they train like one process, and never hang."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, SMALL, coco_options, run_program
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from dsrcnn.config import load_cfg
from dsrcnn.engine.checkpoint import Checkpointer

# Without batch norms, whose statistics are those of a process.
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEVICE", "cpu", "LOG.IMAGES", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = coco_options(folder, count=7)
    content = json.loads((folder / "annotations.json").read_text())
    for annotation in content["annotations"]:  # three images are left without objects
        if annotation["image_id"] in (2, 4, 5):
            annotation["iscrowd"] = 1
    (folder / "annotations.json").write_text(json.dumps(content))
    return options


def arguments(folder, *options, config="sparse_rcnn_shapes"):
    script = ["train_net.py", "--config-file", f"quick/{config}"]
    return [*script, *SMALL, *FROZEN, "OUTPUT_DIR", str(folder), *map(str, options)]


def by_spawn(folder, *options, processes=1, flags=(), **config):
    words = [*arguments(folder, *options, **config), "--num-gpus", str(processes), *flags]
    return [sys.executable, *words]


def torchrun(*flags):
    module = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *flags]
    return [*module, "--master-port", str(29500 + os.getpid() % 1000)]


def by_torchrun(folder, *options, flags=()):
    return [*torchrun(*flags), *arguments(folder, *options), "--resume"]


def logged(folder):
    """Last value of every scalar in the log."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def initial_weights(folder):
    cfg = load_cfg(folder / "config.yaml")
    seed_all_rng(cfg.SEED)
    Checkpointer(build_model(cfg), str(folder)).save("initial")
    return weights_of(folder / "initial.pth")


def weights_of(path):
    return torch.cat([value.flatten() for _, value in sorted(torch.load(path)["model"].items())])


def detections(folder):
    path = folder / "inference/coco_instances_results.json"
    return sorted(json.loads(path.read_text()), key=lambda d: (d["image_id"], -d["score"]))


# Positives as the normalizer, accumulation, and an odd number of images to evaluate. One step,
# since rounding errors can decide which of several untrained proposals is assigned; of SGD, since
# AdamW's first steps are as long for gradients of rounding errors as for any other.
ONE_STEP = [
    *("MODEL.SparseRCNN.DLA.ENABLED", True, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2),
    *("SOLVER.MAX_ITER", 1, "TEST.LOSS", True, "SOLVER.OPTIMIZER", "SGD"),
    *("SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.01),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data):
    """A run in one process."""
    folder = tmp_path_factory.mktemp("one_process")
    run_program(*by_spawn(folder, *data, *ONE_STEP))
    return folder


@pytest.mark.parametrize("start", [by_torchrun, None], ids=["torchrun", "--num-gpus 2"])
def test_two_processes_train_and_evaluate_as_one_does(tmp_path, one_process, data, start):
    two = start or (lambda *a: by_spawn(*a, processes=2))
    text = run_program(*two(tmp_path, *data, *ONE_STEP, "DATALOADER.NUM_WORKERS", 1))
    for printed in ("parameters", "AP50", "Look at it"):  # by the main process only
        assert text.count(printed) == 1
    one, other = logged(one_process), logged(tmp_path)
    names = [n for n in one if n.startswith(("total_loss", "loss", "validation", "gradient"))]
    assert {"total_loss", "validation/total_loss", "gradient_norm"} <= set(names)
    for name in names:
        assert other[name] == pytest.approx(one[name], rel=2e-4), name
    first, second = (weights_of(f / "model_final.pth") for f in (one_process, tmp_path))
    step = first - initial_weights(one_process)
    assert step.norm().item() == pytest.approx(0.01, rel=0.01)  # gradients of norm 1
    assert (second - first).norm() < 0.01 * step.norm()


@pytest.mark.slow
def test_asag_trains_in_two_processes_with_different_patches(tmp_path, data):
    """Every process must reach every parameter, with or without objects in its images."""
    parts = ["SOLVER.ACCUMULATE", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.AMP.ENABLED", True]
    asag = ["MODEL.ASAG.ANCHORS.HIDDEN", 32, "MODEL.ASAG.GUIDED_PART", 0.5]
    asag += ["MODEL.ASAG.DN.ENABLED", True, "MODEL.ASAG.DN.NUM", 5, "MODEL.EMA.ENABLED", True]
    run_program(*by_spawn(tmp_path, *data, *parts, *asag, processes=2, config="asag_a_shapes"))
    assert 0 < logged(tmp_path)["total_loss"] < 1e6


def test_evaluation_in_two_processes_equals_evaluation_in_one(tmp_path, one_process, data):
    weights = ["MODEL.WEIGHTS", str(one_process / "model_final.pth")]
    run_program(*by_spawn(tmp_path, *data, *weights, processes=2, flags=["--eval-only"]))
    expected, merged = detections(one_process), detections(tmp_path)
    assert len({d["image_id"] for d in expected}) > 4  # of both processes
    for a, b in zip(expected, merged, strict=True):
        assert a["image_id"] == b["image_id"]
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)


SHUTDOWN = """
import os
import sys
from pathlib import Path
from torch import nn, ones
from detectron2.utils import comm
from dsrcnn.engine.processes import Processes, run_processes, wrap_ddp

def threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            pass  # it has ended just now
    return " ".join(names)

def work():
    model = wrap_ddp(nn.Linear(2, 2))
    model.cycle = model
    model(ones(1, 2)).sum().backward()
    comm.all_gather("words")
    global during
    during = threads()

run_processes(Processes("cpu"), work)
Path(sys.argv[1], f"{os.getpid()}.txt").write_text(f"{during}\\n{threads()}")
"""


@pytest.mark.slow
def test_shutdown_ends_the_threads_of_the_process_groups(tmp_path):
    """A thread that lives on can abort its process while the interpreter shuts down."""
    script = tmp_path / "shutdown.py"
    script.write_text(SHUTDOWN)
    run_program(*torchrun(), script, tmp_path)
    threads = [path.read_text().split("\n") for path in tmp_path.glob("*.txt")]
    assert len(threads) == 2
    for during, after in threads:
        assert "gloo" in during
        assert "gloo" not in after


def children(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    with open(path) as file:
        return [int(x) for x in file.read().split()]


def is_worker(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        words = file.read()
    return "spawn_main" in words or "train_net.py" in words


def kill_one(command, checkpoint, signal_of_all=None):
    """Start a run and kill a process after a checkpoint; returns status, stderr and processes.

    With `signal_of_all`, that is sent to the process that was started instead.
    """
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, **streams)
    try:
        end = time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < end:
            time.sleep(0.05)
        workers = [pid for pid in children(process.pid) if is_worker(pid)]
        os.kill(*((process.pid, signal_of_all) if signal_of_all else (workers[-1], signal.SIGKILL)))
        _, message = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, message, workers


@pytest.mark.slow
def test_a_run_ends_with_a_message_when_a_process_is_killed(tmp_path, data):
    options = [*data, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 2]
    command = by_spawn(tmp_path / "out", *options, processes=2)
    status, message, workers = kill_one(command, tmp_path / "out/model_0000001.pth")
    assert status == 1
    assert "was killed by SIGKILL" in message
    assert "--resume continues" in message
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(
    ("number", "expected"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_to_the_first_process_stops_all_with_the_state_saved(
    tmp_path, data, number, expected
):
    options = [*data, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 2]
    options += ["TEST.EVAL_PERIOD", 2, "DATALOADER.NUM_WORKERS", 1]  # it comes in an evaluation
    command = by_spawn(tmp_path / "out", *options, processes=2)
    status, message, workers = kill_one(command, tmp_path / "out/model_0000001.pth", number)
    assert status == expected, message
    saved = re.search(r"after (\d+) iterations is saved as (model_\d+\.pth)", message)
    assert torch.load(tmp_path / "out" / saved[2])["iteration"] + 1 == int(saved[1])
    assert "Traceback" not in message
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


@pytest.mark.slow
def test_a_run_restarted_by_torchrun_continues_from_its_checkpoint(tmp_path, data):
    options = [*data, "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 2]
    command = by_torchrun(tmp_path / "out", *options, flags=["--max-restarts", "1"])
    status, message, _ = kill_one(command, tmp_path / "out/model_0000001.pth")
    assert status == 0, message
    assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 19
    log = (tmp_path / "out/log.txt").read_text()
    starts = [int(x) for x in re.findall(r"Starting training from iteration (\d+)", log)]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]


def test_an_error_of_one_process_ends_both_with_its_message(tmp_path, data):
    images = Path(data[data.index("DATASETS.CUSTOM.TRAIN_IMAGES") + 1])
    copy = shutil.copytree(images, tmp_path / "images")
    (copy / "3.jpg").write_bytes(b"broken")
    options = [*data, "DATASETS.CUSTOM.TRAIN_IMAGES", copy, "SOLVER.MAX_ITER", 100]
    message = run_program(*by_spawn(tmp_path / "out", *options, processes=2), status=2)
    assert "3.jpg cannot be read" in message
    assert "\nerror: Image" in message
