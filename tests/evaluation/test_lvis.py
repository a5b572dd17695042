"""LVIS with its own files and its own metrics."""

import json
import sys

import numpy as np
import pytest
from coco_cases import evaluate
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from PIL import Image

from dsrcnn.data import build_train_loader
from dsrcnn.data.datasets.custom import check_registered
from dsrcnn.errors import DataError
from dsrcnn.evaluation import build_evaluator

NAME = "lvis_v1_under_test"  # Detectron2 reads the version of LVIS from the name


@pytest.fixture
def lvis(tmp_path):
    """Two images: class 1 in the first, class 2 in the second, which is known to lack class 3."""
    pytest.importorskip("lvis", reason="pip install --no-deps lvis")
    images, annotations = [], []
    for number in (1, 2):
        path = tmp_path / f"val2017/{number:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save(path)
        url = f"http://images.cocodataset.org/val2017/{path.name}"
        image = {"id": number, "coco_url": url, "height": 50, "width": 80}
        missing = [3] if number == 2 else []
        images.append({**image, "neg_category_ids": missing, "not_exhaustive_category_ids": []})
        corners = [10, 5, 50, 5, 50, 30, 10, 30]
        annotations.append({"id": number, "image_id": number, "category_id": number})
        annotations[-1] |= {"bbox": [10, 5, 40, 25], "area": 1000.0, "segmentation": [corners]}
    # 1203 classes as in LVIS v1; the first ones rare, common and frequent in turn.
    categories = [
        {"id": number, "name": f"class {number}", "frequency": "rcf"[(number - 1) % 3]}
        for number in range(1, 1204)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    register_lvis_instances(NAME, {}, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    return NAME


def test_lvis_is_loaded_and_evaluated_by_frequency(lvis, tmp_path, monkeypatch):
    monkeypatch.delattr(np, "float", raising=False)  # numpy without this package's patches
    records = DatasetCatalog.get(lvis)
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]
    assert len(MetadataCatalog.get(lvis).thing_classes) == 1203
    # The rare one exactly, the common one with 24 of its 40 pixels of width: IoU 0.6. Class 600 is
    # neither in the image nor known to be missing: LVIS does not count it.
    boxes = (10, 5, 50, 30), (10, 5, 34, 30)
    detections = [[(i, 0.9, *box), (600, 0.8, *box)] for i, box in enumerate(boxes)]
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), lvis)
    result = evaluate(records, detections, evaluator=evaluator)
    assert result["APr"] == pytest.approx(100)
    assert result["APc"] == pytest.approx(30, abs=1e-3)  # thresholds 0.5, 0.55 and 0.6
    assert result["AP"] == pytest.approx(65, abs=1e-3)
    assert np.isnan([result["APf"], result["APl"]]).all()  # no such objects
    assert "float" not in vars(np)


def test_lvis_can_be_trained_on(lvis):
    cfg = tiny_cfg("DATASETS.TRAIN", (lvis,), "SOLVER.IMS_PER_BATCH", 2)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    batch = next(iter(build_train_loader(cfg)))
    assert {int(sample["instances"].gt_classes[0]) for sample in batch} <= {0, 1}


def test_a_missing_lvis_package_is_one_message(monkeypatch, tmp_path):
    register_lvis_instances(NAME, {}, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    check_registered(NAME)
    monkeypatch.setitem(sys.modules, "lvis", None)
    with pytest.raises(DataError, match=r"needs the package lvis, .*pip install --no-deps lvis"):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", (NAME,)))
