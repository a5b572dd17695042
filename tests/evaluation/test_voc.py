"""Pascal VOC, in its own layout and by its own metric."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.structures import Boxes, Instances
from PIL import Image

from dsrcnn.data import DetectionMapper
from dsrcnn.evaluation import build_evaluator

NAME = "voc_2007_under_test"
OBJECT = """<object><name>{}</name><pose>Left</pose><truncated>0</truncated>
<difficult>0</difficult><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
FILES = {"000001": [("cat", 11, 6, 50, 30)], "000002": [("dog", 21, 11, 60, 40)]}


@pytest.fixture
def voc(tmp_path):
    """Two images with an object each."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for stem, objects in FILES.items():
        Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save(tmp_path / f"JPEGImages/{stem}.jpg")
        size = "<size><width>80</width><height>50</height><depth>3</depth></size>"
        body = "".join(OBJECT.format(*o) for o in objects)
        text = f"<annotation>{size}{body}</annotation>"
        (tmp_path / f"Annotations/{stem}.xml").write_text(text)
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(FILES) + "\n")
    register_pascal_voc(NAME, str(tmp_path), "val", 2007, ["cat", "dog"])
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_voc_loads_maps_and_evaluates(voc):
    from conftest import tiny_cfg

    records = DatasetCatalog.get(voc)
    assert [r["annotations"][0]["bbox"] for r in records] == [[10, 5, 50, 30], [20, 10, 60, 40]]
    sample = DetectionMapper(tiny_cfg(), is_train=True)(records[0])
    assert sample["instances"].gt_classes.tolist() == [0]
    evaluator = build_evaluator(tiny_cfg(), voc)
    evaluator.reset()
    # The cat is found exactly, the dog with 24 of its 40 pixels of width: IoU 0.6.
    for record, box in zip(records, ([10.0, 5, 50, 30], [20.0, 10, 44, 40]), strict=True):
        found = Instances((50, 80))
        found.pred_boxes = Boxes(torch.tensor([box]))
        found.scores = torch.tensor([0.9])
        found.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        evaluator.process([record], [{"instances": found}])
    result = evaluator.evaluate()["bbox"]
    assert result["AP75"] == pytest.approx(50.0)
    assert result["AP50"] == pytest.approx(100.0)
