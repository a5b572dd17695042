"""The command line: what works, and one clear message for what cannot."""

import json
import logging
import subprocess
import sys

import cv2
import pytest
import torch
from conftest import REPOSITORY, SMALL
from detectron2.utils.logger import setup_logger

from dsrcnn.data.datasets.shapes import CLASSES, draw_scene, shapes_records
from dsrcnn.engine.main import run

QUICK = ["--config-file", "quick/sparse_rcnn_shapes"]


@pytest.fixture(autouse=True)
def _fresh_loggers():
    """Detectron2 keeps log handlers as long as the process, a test has streams of its own."""
    yield
    for name in ("detectron2", "fvcore", "dsrcnn"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()


def fails_with(capsys, *arguments):
    """The message of a run that must end with status 2."""
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rsplit("error: ", 1)[1]


@pytest.fixture
def coco_folder(tmp_path):
    """Eight drawn images as a COCO data set whose category ids have gaps."""
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


def custom(folder, *, output):
    return [
        "DATASETS.CUSTOM.NAME", "mine", "OUTPUT_DIR", str(output),
        "DATASETS.CUSTOM.TRAIN_JSON", str(folder / "train.json"),
        "DATASETS.CUSTOM.TRAIN_IMAGES", str(folder),
        "DATASETS.CUSTOM.TEST_JSON", str(folder / "train.json"),
        "DATASETS.CUSTOM.TEST_IMAGES", str(folder),
    ]  # fmt: skip


def test_ones_own_coco_json_trains_resumes_and_evaluates(coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    options = [*SMALL, *custom(coco_folder, output=output)]
    assert run([*QUICK, *options]) == 0
    assert run([*QUICK, "--resume", *options, "SOLVER.MAX_ITER", "3"]) == 0
    final = str(output / "model_final.pth")
    assert torch.load(final)["iteration"] == 2
    capsys.readouterr()
    assert run([*QUICK, "--eval-only", *options, "MODEL.WEIGHTS", final]) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert "triangle" in printed
    results = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert {r["category_id"] % 10 for r in results} == {3}
    assert (output / "config.yaml").is_file()


def test_a_config_that_does_not_exist_is_named_with_close_ones(capsys):
    message = fails_with(capsys, "--config-file", "quick/sparse_rcnn_shape.yaml")
    assert "quick/sparse_rcnn_shape.yaml" in message
    assert "quick/sparse_rcnn_shapes" in message


def test_an_unknown_key_is_named_with_close_ones(capsys):
    message = fails_with(capsys, *QUICK, "MODEL.SparseRCNN.NUM_PROPOSAL", "5")
    assert "MODEL.SparseRCNN.NUM_PROPOSAL'" in message
    assert "Did you mean MODEL.SparseRCNN.NUM_PROPOSALS" in message


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs a machine without two GPUs")
def test_more_gpus_than_there_are_is_an_error(capsys):
    message = fails_with(capsys, "--num-gpus", "2", *QUICK)
    assert f"--num-gpus is 2, but torch finds {torch.cuda.device_count()}" in message


def test_several_machines_need_an_address_that_others_find(capsys):
    message = fails_with(capsys, "--num-machines", "2", *QUICK, "MODEL.DEVICE", "cpu")
    assert "--dist-url is tcp://127.0.0.1" in message
    assert "--dist-url tcp://<first machine>" in message


def test_several_processes_cannot_share_one_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    message = fails_with(capsys, "--num-gpus", "2", *QUICK, "MODEL.DEVICE", "cuda:1")
    assert "every process takes a GPU of its own" in message


def test_torchrun_alone_says_how_many_processes_there_are(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    message = fails_with(capsys, "--num-gpus", "2", *QUICK, "MODEL.DEVICE", "cpu")
    assert "torchrun has started the processes already" in message


def test_a_wrong_class_count_says_what_to_write(coco_folder, tmp_path, capsys):
    options = [*SMALL, *custom(coco_folder, output=tmp_path / "out")]
    message = fails_with(capsys, *QUICK, *options, "MODEL.SparseRCNN.NUM_CLASSES", "80")
    assert "NUM_CLASSES is 80" in message
    assert "Write MODEL.SparseRCNN.NUM_CLASSES 5" in message


def test_weights_of_another_class_count_cannot_be_evaluated(tmp_path, capsys):
    options = [*QUICK, *SMALL, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"]
    assert run(options) == 0
    path = tmp_path / "model_final.pth"
    content = torch.load(path)
    for key in [k for k in content["model"] if "class_logits" in k]:
        content["model"][key] = content["model"][key][:3]
    torch.save(content, path)
    message = fails_with(capsys, "--eval-only", *options, "MODEL.WEIGHTS", str(path))
    assert "The file has 3 classes, the model 5" in message


def test_evaluating_without_weights_is_an_error(tmp_path, capsys):
    options = [*QUICK, *SMALL, "OUTPUT_DIR", str(tmp_path)]
    assert "random weights" in fails_with(capsys, "--eval-only", *options)


def test_a_missing_image_is_found_before_training(coco_folder, tmp_path, capsys):
    (coco_folder / "3.jpg").unlink()
    options = [*SMALL, *custom(coco_folder, output=tmp_path / "out")]
    message = fails_with(capsys, *QUICK, *options)
    assert "1 of 8 images" in message
    assert "3.jpg" in message


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named_and_the_model_kept(coco_folder, tmp_path, capsys, workers):
    path = coco_folder / "5.jpg"
    path.write_bytes(path.read_bytes()[:600])
    options = [*SMALL, *custom(coco_folder, output=tmp_path / "out")]
    options += ["SOLVER.MAX_ITER", "40", "DATALOADER.NUM_WORKERS", workers]
    message = fails_with(capsys, *QUICK, *options)
    assert "5.jpg cannot be read" in message
    assert "replace the file or remove it" in message
    assert "--resume goes on" in message or "There is no checkpoint" in message


def test_bad_boxes_are_left_out_with_one_warning_and_training_goes_on(
    coco_folder, tmp_path, capsys
):
    content = json.loads((coco_folder / "train.json").read_text())
    for annotation, box in zip(
        content["annotations"],
        ([5, 5, 0, 9], [float("nan"), 1, 5, 5], [900, 900, 5, 5], [-4, -4, 30, 30]),
        strict=False,
    ):
        annotation["bbox"] = box
    (coco_folder / "train.json").write_text(json.dumps(content))
    options = [*SMALL, *custom(coco_folder, output=tmp_path / "out")]
    assert run([*QUICK, *options]) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    warnings = [x for x in log.splitlines() if "boxes cannot be used" in x]
    assert warnings
    assert all(
        "3 boxes" in x and "no area" in x and "not finite" in x and "outside" in x for x in warnings
    )


@pytest.mark.parametrize(
    ("key", "words"), [("images", "lists no images"), ("annotations", "no box that can be used")]
)
def test_an_empty_data_set_is_an_error(coco_folder, tmp_path, capsys, key, words):
    content = json.loads((coco_folder / "train.json").read_text())
    content |= {"images": [], "annotations": []} if key == "images" else {"annotations": []}
    (coco_folder / "train.json").write_text(json.dumps(content))
    message = fails_with(capsys, *QUICK, *SMALL, *custom(coco_folder, output=tmp_path / "out"))
    assert words in message
    assert "train.json" in message


def test_a_data_set_that_is_not_on_the_machine_says_where_to_put_it(tmp_path, capsys, monkeypatch):
    options = [*SMALL, "MODEL.SparseRCNN.NUM_CLASSES", "80", "OUTPUT_DIR", str(tmp_path)]
    options += ["DATASETS.TRAIN", "('coco_2014_minival_100',)", "DATASETS.TEST", "()"]
    message = fails_with(capsys, *QUICK, *options)
    assert "coco_2014_minival_100" in message
    assert "DETECTRON2_DATASETS" in message


def test_the_script_itself_ends_with_a_message_and_no_traceback():
    command = [sys.executable, "train_net.py", "--config-file", "nothing.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: Config file 'nothing.yaml' does not exist" in done.stderr
    assert "Traceback" not in done.stderr
