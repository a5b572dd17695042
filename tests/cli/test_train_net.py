"""``train_net.py``: training and evaluation, and one clear message for invalid input."""

import json
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import REPOSITORY, SMALL, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.data.datasets.shapes import CLASSES, draw_scene, shapes_records
from dsrcnn.engine.main import run

QUICK = ["--config-file", "quick/sparse_rcnn_shapes"]


def fails_with(capsys, *arguments):
    """Return the message of a run that must end with status 2."""
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rsplit("error: ", 1)[1]


@pytest.fixture
def coco_folder(tmp_path):
    """Eight drawn images as a COCO dataset whose category ids have gaps."""
    images, annotations = [], []
    for record in shapes_records("val")[:8]:
        name = f"{record['image_id']}.jpg"
        cv2.imwrite(str(tmp_path / name), draw_scene("val", record["image_id"]))
        shape = {k: record[k] for k in ("height", "width")}
        images.append({"id": record["image_id"], "file_name": name, **shape})
        for annotation in record["annotations"]:
            x1, y1, x2, y2 = annotation["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": 10 * annotation["category_id"] + 3,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 10 * i + 3, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def custom(coco_folder):
    """Config file and options that train the tiny model on the folder."""
    return [
        *QUICK, *SMALL, "DATASETS.CUSTOM.NAME", "mine", "OUTPUT_DIR", str(coco_folder / "out"),
        "DATASETS.CUSTOM.TRAIN_JSON", str(coco_folder / "train.json"),
        "DATASETS.CUSTOM.TRAIN_IMAGES", str(coco_folder),
        "DATASETS.CUSTOM.TEST_JSON", str(coco_folder / "train.json"),
        "DATASETS.CUSTOM.TEST_IMAGES", str(coco_folder),
    ]  # fmt: skip


def edit(folder, change):
    path = folder / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_coco_json_trains_resumes_and_evaluates(coco_folder, custom, capsys):
    output = coco_folder / "out"
    assert run(custom) == 0
    assert run([*custom, "SOLVER.MAX_ITER", "3", "--resume"]) == 0  # options in any order
    final = str(output / "model_final.pth")
    assert torch.load(final)["iteration"] == 2
    capsys.readouterr()
    assert run(["--eval-only", *custom, "MODEL.WEIGHTS", final]) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert "triangle" in printed
    results = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert {r["category_id"] % 10 for r in results} == {3}
    assert (output / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["--config-file", "quick/sparse_rcnn_shape.yaml"],
            ["quick/sparse_rcnn_shape.yaml", "quick/sparse_rcnn_shapes"],
        ),
        (
            [*QUICK, "MODEL.SparseRCNN.NUM_PROPOSAL", "5"],
            ["NUM_PROPOSAL'", "Did you mean MODEL.SparseRCNN.NUM_PROPOSALS"],
        ),
        ([*QUICK, "MODEL.DEVICE", "cpu", "--resmue"], ["unknown option --resmue"]),
        ([*QUICK, "SEEDS", "-1"], ["Unknown config key 'SEEDS'", "SEED"]),
        ([*QUICK, "MODEL.DEVICE"], ["Overrides come in pairs"]),
        (
            ["--num-machines", "2", *QUICK, "MODEL.DEVICE", "cpu"],
            ["--dist-url is ''", "--dist-url tcp://<first machine>"],
        ),
        ([*QUICK, "--eval-only"], ["random weights"]),
    ],
)
def test_invalid_arguments_are_one_message(words, messages, capsys, tmp_path):
    options = ["OUTPUT_DIR", str(tmp_path)] if words[-1] == "--eval-only" else []
    error = fails_with(capsys, *words, *options)
    assert all(message in error for message in messages)
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine without two GPUs")
def test_more_gpus_than_there_are_is_an_error(capsys):
    message = fails_with(capsys, "--num-gpus", "2", *QUICK)
    assert f"--num-gpus is 2, but torch finds {torch.cuda.device_count()}" in message


def test_several_processes_cannot_share_one_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    message = fails_with(capsys, "--num-gpus", "2", *QUICK, "MODEL.DEVICE", "cuda:1")
    assert "every process needs its own GPU" in message


def test_the_number_of_processes_comes_from_torchrun_alone(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    message = fails_with(capsys, "--num-gpus", "2", *QUICK, "MODEL.DEVICE", "cpu")
    assert "torchrun has started the processes already" in message


def test_a_wrong_class_count_is_an_error_with_the_right_one(custom, capsys):
    message = fails_with(capsys, *custom, "MODEL.SparseRCNN.NUM_CLASSES", "80")
    assert "NUM_CLASSES is 80" in message
    assert "Write MODEL.SparseRCNN.NUM_CLASSES 5" in message


def test_weights_of_another_class_count_cannot_be_evaluated(tmp_path, capsys):
    model = build_model(tiny_cfg("MODEL.SparseRCNN.NUM_CLASSES", 3))
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    options = [*QUICK, *SMALL, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(path)]
    assert "The classifier of the file has 3 outputs, the model's 5" in fails_with(
        capsys, "--eval-only", *options
    )


def test_a_missing_image_is_an_error_before_training(coco_folder, custom, capsys):
    (coco_folder / "3.jpg").unlink()
    message = fails_with(capsys, *custom)
    assert "1 of 8 images" in message
    assert "3.jpg" in message


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named_and_the_model_saved(coco_folder, custom, capsys, workers):
    path = coco_folder / "5.jpg"
    path.write_bytes(path.read_bytes()[:600])
    options = ["SOLVER.MAX_ITER", "40", "DATALOADER.NUM_WORKERS", workers]
    message = fails_with(capsys, *custom, *options)
    assert "5.jpg cannot be read" in message
    assert "replace the file or remove it" in message
    assert "--resume continues" in message or "There is no checkpoint" in message


def test_unusable_boxes_are_left_out_with_one_warning(coco_folder, custom):
    def break_boxes(content):
        boxes = ([5, 5, 0, 9], [float("nan"), 1, 5, 5], [900, 900, 5, 5], [-4, -4, 30, 30])
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    edit(coco_folder, break_boxes)
    assert run(custom) == 0
    log = (coco_folder / "out/log.txt").read_text()
    (warning,) = [x for x in log.splitlines() if "boxes cannot be used" in x]
    assert all(x in warning for x in ("3 boxes", "no area", "not finite", "outside"))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["images", "annotations"], "lists no images"),
        (["annotations"], "no box that can be used"),
    ],
)
def test_an_empty_data_set_is_an_error(coco_folder, custom, capsys, parts, words):
    edit(coco_folder, lambda content: content.update({part: [] for part in parts}))
    message = fails_with(capsys, *custom)
    assert words in message
    assert "train.json" in message


def test_a_data_set_that_is_not_on_the_machine_is_an_error_with_its_place(tmp_path, capsys):
    options = [*SMALL, "MODEL.SparseRCNN.NUM_CLASSES", "80", "OUTPUT_DIR", str(tmp_path)]
    options += ["DATASETS.TRAIN", "('coco_2014_minival_100',)", "DATASETS.TEST", "()"]
    message = fails_with(capsys, *QUICK, *options)
    assert "coco_2014_minival_100" in message
    assert "DETECTRON2_DATASETS" in message


def test_the_script_ends_with_a_message_and_no_traceback():
    command = [sys.executable, "train_net.py", "--config-file", "nothing.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: Config file 'nothing.yaml' does not exist" in done.stderr
    assert "Traceback" not in done.stderr
