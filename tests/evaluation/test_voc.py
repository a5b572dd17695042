"""Pascal VOC with its own files and its own metrics."""

import numpy as np
import pytest
from coco_cases import evaluate
from conftest import tiny_cfg, write_voc
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc

from dsrcnn.data import DetectionMapper
from dsrcnn.evaluation import build_evaluator

NAME = "voc_2007_under_test"


@pytest.fixture
def voc(tmp_path):
    """Two images with an object each."""
    objects = {"000001": [("cat", 11, 6, 50, 30)], "000002": [("dog", 21, 11, 60, 40)]}
    write_voc(tmp_path, objects, {"val": list(objects)})
    register_pascal_voc(NAME, str(tmp_path), "val", 2007, ["cat", "dog"])
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"


@pytest.mark.usefixtures("voc")
def test_voc_is_loaded_mapped_and_evaluated():
    records = DatasetCatalog.get(NAME)
    assert [r["annotations"][0]["bbox"] for r in records] == [[10, 5, 50, 30], [20, 10, 60, 40]]
    sample = DetectionMapper(tiny_cfg(), is_train=True)(records[0])
    assert sample["instances"].gt_classes.tolist() == [0]
    # The cat exactly, the dog with 24 of its 40 pixels of width: IoU 0.6.
    detections = [(0, 0.9, 10, 5, 50, 30)], [(1, 0.9, 20, 10, 44, 40)]
    result = evaluate(records, detections, evaluator=build_evaluator(tiny_cfg(), NAME))
    assert (result["AP50"], result["AP75"]) == pytest.approx((100, 50))


@pytest.mark.usefixtures("voc")
def test_a_class_without_objects_does_not_count(tmp_path):
    name = "voc_2012_under_test"
    register_pascal_voc(name, str(tmp_path), "val", 2012, ["bird", "cat", "fox", "dog"])
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    records = DatasetCatalog.get(name)
    boxes = [(1, 0.9, 10, 5, 50, 30), (0, 0.3, 1, 1, 9, 9)], [(3, 0.9, 20, 10, 60, 40)]
    evaluator = build_evaluator(tiny_cfg(), name)
    for _ in range(2):  # it can be used again
        result = evaluate(records, boxes, evaluator=evaluator)
        assert result == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def test_a_test_set_without_objects_has_no_ap(tmp_path):
    write_voc(tmp_path, {"000001": [], "000002": []}, {"val": ["000001", "000002"]})
    register_pascal_voc(NAME, str(tmp_path), "val", 2007, ["cat", "dog"])
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
    records = DatasetCatalog.get(NAME)
    evaluator = build_evaluator(tiny_cfg(), NAME)
    result = evaluate(records, [[(0, 0.9, 10, 5, 50, 30)], []], evaluator=evaluator)
    assert np.isnan(list(result.values())).all()
