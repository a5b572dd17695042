"""``dsrcnn eval --report``: one page, whose numbers are those of the evaluation."""

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import QUICK, SMALL, refusal, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from dsrcnn import load_cfg
from dsrcnn.analysis import report
from dsrcnn.analysis.report import evaluate_in_detail, write_page
from dsrcnn.cli.main import main
from dsrcnn.engine.main import evaluate, run
from dsrcnn.evaluation.errors import ImageDetections


def coco_options(folder):
    custom = {}
    for split, name in (("TRAIN", "train"), ("TEST", "val")):
        write_coco(folder / f"{name}.json", folder / name, 4, seed=split == "TEST")
        custom |= {f"{split}_JSON": folder / f"{name}.json", f"{split}_IMAGES": folder / name}
    custom["NAME"] = "cells"
    return [str(x) for k, v in custom.items() for x in (f"DATASETS.CUSTOM.{k}", v)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = [*SMALL, *coco_options(folder), "OUTPUT_DIR", str(folder / "out")]
    assert run([*QUICK, *options]) == 0
    return folder / "out"


def test_the_report_is_one_page_with_the_metrics_of_the_evaluation(trained, capsys):
    assert main(["eval", str(trained), "--report"]) == 0
    printed = capsys.readouterr().out
    path = trained / "report.html"
    assert str(path) in printed
    page = path.read_text()
    opts = ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
    expected = evaluate(load_cfg(trained / "config.yaml", opts))["bbox"]
    ap = "" if expected["AP"] != expected["AP"] else f"{expected['AP']:.1f}"
    assert f"<h1>cells_test: AP {ap}</h1>" in page
    assert not re.findall(r"(?:src|href)='(?!data:)", page)  # nothing outside of the page
    assert page.count("data:image/jpeg") == 4  # the worst images
    for text in ("<h2>Stages</h2>", "<td>left</td>", "<h2>Confusion</h2>", "NUM_PROPOSALS: 8"):
        assert text in page
    stages = re.search(r"<h2>Stages</h2>.*?</table>", page, re.DOTALL)[0]
    last = re.findall(r"<tr><td>(\d)</td><td>([\d.]*)</td>", stages)[-1]
    assert last == ("2", ap)


@pytest.mark.parametrize("config", ["quick/faster_rcnn_shapes", "quick/asag_s_shapes"])
def test_models_without_a_cascade_have_a_report_without_stages(config, tmp_path):
    options = [*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "0", "MODEL.ASAG.ANCHORS.HIDDEN", "32"]
    options += [*coco_options(tmp_path), "OUTPUT_DIR", str(tmp_path / "out")]
    assert run(["--config-file", config, *options]) == 0
    assert main(["eval", str(tmp_path / "out"), "--report"]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "<h2>Errors</h2>" in page
    assert "<h2>Stages</h2>" not in page


def test_the_report_may_go_elsewhere_and_needs_an_html_file(trained, tmp_path, capsys):
    words = ["eval", "--report", str(trained), "--output", str(tmp_path / "new/page.html")]
    assert main([*words, "TEST.MAX_DETECTIONS", "50"]) == 0
    page = (tmp_path / "new/page.html").read_text()
    assert "<td>2 of 2 images</td>" in page  # the schedule
    error = refusal(capsys, "eval", trained, "--report", "--output", tmp_path / "page.pdf")
    assert "--output" in error
    error = refusal(capsys, "eval", trained, "--output", tmp_path / "page.html")
    assert "write --report, too" in error
    error = refusal(capsys, "eval", trained, "--report", "--num-gpus", 2)
    assert "leave out --num-gpus" in error


def test_the_report_has_only_images_that_the_function_of_the_dataset_returns(trained, tmp_path):
    json_file = tmp_path / "gt.json"
    write_coco(json_file, tmp_path, 4)
    load = partial(load_coco_json, str(json_file), str(tmp_path), "a_part")
    DatasetCatalog.register("a_part", lambda: load()[1:3])
    MetadataCatalog.get("a_part").json_file = str(json_file)
    cfg = load_cfg(trained / "config.yaml", ["MODEL.WEIGHTS", str(trained / "model_final.pth")])
    cfg.DATASETS.TEST = ("a_part",)
    result = evaluate_in_detail(cfg)
    assert [image.image_id for image in result.images] == [2, 3]
    assert [curve.objects for curve in result.curves] == [2, 2]
    write_page(cfg, result, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2


def test_a_test_set_without_labels_is_refused_before_the_model_runs(trained, tmp_path, capsys):
    content = json.loads((trained.parent / "val.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    words = ["DATASETS.CUSTOM.TEST_JSON", tmp_path / "empty.json", "MODEL.WEIGHTS", "missing.pth"]
    message = refusal(capsys, "eval", trained, "--report", *words)
    assert "has no labels, so nothing can be measured. Write dsrcnn eval without" in message


def test_pictures_of_large_images_are_small(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (33_000, 10)).save(path)
    box = np.array([[100.0, 1, 16_500, 9]])
    label = np.array([0])
    image = ImageDetections(box, label, np.array([False]), box, label, np.array([0.9]))
    evaluation = SimpleNamespace(threshold=0.5, classes=["cell"])
    picture = report._draw(str(path), image, evaluation)
    assert picture.shape[1] < 2 * 1600 + 100
    assert report._picture(picture, "wide").startswith("<img")
