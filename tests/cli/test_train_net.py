"""``train_net.py``: training and evaluation, and one clear message for invalid input."""

import json
import sys

import pytest
import torch
from conftest import QUICK, SMALL, coco_options, run_program

from dsrcnn.engine.main import run

NODE = "MODEL.SparseRCNN"


def fails_with(capsys, *arguments):
    """Return the message of a run that must end with status 2."""
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rsplit("error: ", 1)[1]


@pytest.fixture
def custom(tmp_path):
    """Config file and options to train on eight images whose category ids have gaps."""
    options = coco_options(tmp_path, count=8)

    def leave_gaps(content):
        for entry in content["categories"]:
            entry["id"] = 10 * entry["id"] + 3
        for entry in content["annotations"]:
            entry["category_id"] = 10 * entry["category_id"] + 3

    edit(tmp_path, leave_gaps)
    return [*QUICK, *SMALL, "OUTPUT_DIR", str(tmp_path / "out"), *options]


def edit(folder, change):
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_coco_json_trains_resumes_and_evaluates(tmp_path, custom, capsys):
    output = tmp_path / "out"
    assert run(custom) == 0
    assert run([*custom, "SOLVER.MAX_ITER", "3", "--resume"]) == 0  # options in any order
    final = str(output / "model_final.pth")
    assert torch.load(final)["iteration"] == 2
    capsys.readouterr()
    assert run(["--eval-only", *custom, "MODEL.WEIGHTS", final]) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert "left" in printed
    results = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert {r["category_id"] % 10 for r in results} == {3}
    assert (output / "config.yaml").is_file()


@pytest.mark.parametrize(("words", "messages"), [
    (["--config-file", "quick/sparse_rcnn_shape"], ["'quick/sparse_rcnn_shape'", QUICK[1]]),
    ([*QUICK, f"{NODE}.NUM_PROPOSAL", "5"], ["NUM_PROPOSAL'", f"mean {NODE}.NUM_PROPOSALS"]),
    ([*QUICK, "MODEL.DEVICE", "cpu", "--resmue"], ["unknown option --resmue"]),
    ([*QUICK, "SEEDS", "-1"], ["Unknown config key 'SEEDS'", "SEED"]),
    ([*QUICK, "MODEL.DEVICE"], ["Overrides come in pairs"]),
    (["--num-machines", "2", *QUICK, "MODEL.DEVICE", "cpu"],
     ["--dist-url is ''", "--dist-url tcp://<first machine>"]),
    ([*QUICK, "--eval-only"], ["random weights"]),
])  # fmt: skip
def test_invalid_arguments_are_one_message(words, messages, capsys, tmp_path):
    options = ["OUTPUT_DIR", str(tmp_path)] if words[-1] == "--eval-only" else []
    error = fails_with(capsys, *words, *options)
    assert all(message in error for message in messages)
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine without two GPUs")
def test_more_gpus_than_there_are_is_an_error(capsys):
    message = fails_with(capsys, "--num-gpus", "2", *QUICK)
    assert f"--num-gpus is 2, but torch finds {torch.cuda.device_count()}" in message


def started_by_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "2")


@pytest.mark.parametrize("words", [["--num-gpus", "2"], []], ids=["--num-gpus 2", "torchrun"])
def test_several_processes_cannot_share_one_gpu(words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if not words:
        started_by_torchrun(monkeypatch)
    message = fails_with(capsys, *words, *QUICK, "MODEL.DEVICE", "cuda:1")
    assert "every process needs its own GPU" in message


def test_the_number_of_processes_comes_from_torchrun_alone(capsys, monkeypatch):
    started_by_torchrun(monkeypatch)
    message = fails_with(capsys, "--num-gpus", "2", *QUICK, "MODEL.DEVICE", "cpu")
    assert "torchrun has started the processes already" in message


def test_a_missing_image_is_an_error_before_training(tmp_path, custom, capsys):
    (tmp_path / "images/3.jpg").unlink()
    message = fails_with(capsys, *custom)
    assert "1 of 8 images" in message
    assert "3.jpg" in message


def test_unusable_boxes_are_left_out_with_one_warning(tmp_path, custom):
    def break_boxes(content):
        boxes = ([5, 5, 0, 9], [float("nan"), 1, 5, 5], [900, 900, 5, 5], [-4, -4, 30, 30])
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    edit(tmp_path, break_boxes)
    assert run(custom) == 0
    log = (tmp_path / "out/log.txt").read_text()
    (warning,) = [x for x in log.splitlines() if "boxes cannot be used" in x]
    assert all(x in warning for x in ("3 boxes", "no area", "not finite", "outside"))


def test_the_script_ends_with_a_message_and_no_traceback():
    words = ["train_net.py", "--config-file", "nothing.yaml"]
    printed = run_program(sys.executable, *words, status=2)
    assert "error: Config file 'nothing.yaml' does not exist" in printed
    assert "Traceback" not in printed
