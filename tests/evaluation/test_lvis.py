"""LVIS, in its own layout and by its own metric."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.structures import Boxes, Instances
from PIL import Image

from dsrcnn.data import build_train_loader
from dsrcnn.data.datasets.custom import check_registered
from dsrcnn.errors import DataError
from dsrcnn.evaluation import build_evaluator

NAME = "lvis_v1_under_test"  # Detectron2 tells the version of LVIS by the name
SIZES = "rcf"


def category(number):
    """1203 classes as in LVIS v1; the first ones rare, common and frequent in turn."""
    return {"id": number, "name": f"class {number}", "frequency": SIZES[(number - 1) % 3]}


@pytest.fixture
def lvis(tmp_path):
    """Two images: class 1 in the first, class 2 in the second, which is known to lack class 3."""
    pytest.importorskip("lvis", reason="pip install --no-deps lvis")
    images, annotations = [], []
    for number, label in ((1, 1), (2, 2)):
        path = tmp_path / f"val2017/{number:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save(path)
        url = f"http://images.cocodataset.org/val2017/{path.name}"
        image = {"id": number, "coco_url": url, "height": 50, "width": 80}
        missing = [3] if number == 2 else []
        images.append({**image, "neg_category_ids": missing, "not_exhaustive_category_ids": []})
        corners = [10, 5, 50, 5, 50, 30, 10, 30]
        annotations.append({"id": number, "image_id": number, "category_id": label})
        annotations[-1] |= {"bbox": [10, 5, 40, 25], "area": 1000.0, "segmentation": [corners]}
    content = {"images": images, "annotations": annotations}
    content["categories"] = [category(number) for number in range(1, 1204)]
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    register_lvis_instances(NAME, {}, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def predicted(box, label):
    found = Instances((50, 80))
    found.pred_boxes = Boxes(torch.tensor([box, box]))
    found.scores = torch.tensor([0.9, 0.8])
    # Class 600 is neither in the image nor known to be missing: LVIS does not count it.
    found.pred_classes = torch.tensor([label, 600])
    return found


def test_lvis_loads_and_is_evaluated_by_frequency(lvis, tmp_path, monkeypatch):
    monkeypatch.delattr(np, "float", raising=False)  # as numpy is, without the help for 0.6
    records = DatasetCatalog.get(lvis)
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]
    assert len(MetadataCatalog.get(lvis).thing_classes) == 1203
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), lvis)
    evaluator.reset()
    # The rare one exactly, the common one with 24 of its 40 pixels of width: IoU 0.6.
    for record, box in zip(records, ([10.0, 5, 50, 30], [10.0, 5, 34, 30]), strict=True):
        found = predicted(box, record["annotations"][0]["category_id"])
        evaluator.process([record], [{"instances": found}])
    result = evaluator.evaluate()["bbox"]
    assert result["APr"] == pytest.approx(100)
    assert result["APc"] == pytest.approx(30, abs=1e-3)  # thresholds 0.5, 0.55 and 0.6
    assert result["AP"] == pytest.approx(65, abs=1e-3)
    assert "float" not in vars(np)


def test_lvis_is_trained_on(lvis, tmp_path):
    cfg = tiny_cfg("DATASETS.TRAIN", (lvis,), "SOLVER.IMS_PER_BATCH", 2)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.NUM_WORKERS = 0
    batch = next(iter(build_train_loader(cfg)))
    assert {int(sample["instances"].gt_classes[0]) for sample in batch} <= {0, 1}


def test_the_missing_package_is_one_message(monkeypatch, tmp_path):
    name = "lvis_v1_not_there"
    register_lvis_instances(name, {}, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    check_registered(name)
    monkeypatch.setitem(__import__("sys").modules, "lvis", None)
    try:
        with pytest.raises(
            DataError, match=r"needs the package lvis, .*pip install --no-deps lvis"
        ):
            build_train_loader(tiny_cfg("DATASETS.TRAIN", (name,)))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
