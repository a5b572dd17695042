"""Pascal VOC with its own files and its own metrics."""

import numpy as np
import pytest
from coco_cases import output_of
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from PIL import Image

from dsrcnn.data import DetectionMapper
from dsrcnn.evaluation import build_evaluator

pytestmark = pytest.mark.usefixtures("clean_catalogs")

NAME = "voc_2007_under_test"
OBJECT = """<object><name>{}</name><pose>Left</pose><truncated>0</truncated>
<difficult>0</difficult><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
FILES = {"000001": ("cat", 11, 6, 50, 30), "000002": ("dog", 21, 11, 60, 40)}


@pytest.fixture
def voc(tmp_path):
    """Two images with an object each."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    size = "<size><width>80</width><height>50</height><depth>3</depth></size>"
    for stem, annotation in FILES.items():
        Image.fromarray(np.zeros((50, 80, 3), np.uint8)).save(tmp_path / f"JPEGImages/{stem}.jpg")
        text = f"<annotation>{size}{OBJECT.format(*annotation)}</annotation>"
        (tmp_path / f"Annotations/{stem}.xml").write_text(text)
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(FILES) + "\n")
    register_pascal_voc(NAME, str(tmp_path), "val", 2007, ["cat", "dog"])
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"


@pytest.mark.usefixtures("voc")
def test_voc_is_loaded_mapped_and_evaluated():
    records = DatasetCatalog.get(NAME)
    assert [r["annotations"][0]["bbox"] for r in records] == [[10, 5, 50, 30], [20, 10, 60, 40]]
    sample = DetectionMapper(tiny_cfg(), is_train=True)(records[0])
    assert sample["instances"].gt_classes.tolist() == [0]
    evaluator = build_evaluator(tiny_cfg(), NAME)
    evaluator.reset()
    # The cat exactly, the dog with 24 of its 40 pixels of width: IoU 0.6.
    for record, box in zip(records, ([10, 5, 50, 30], [20, 10, 44, 40]), strict=True):
        label = record["annotations"][0]["category_id"]
        evaluator.process([record], [output_of(record, [(label, 0.9, *box)])])
    result = evaluator.evaluate()["bbox"]
    assert (result["AP50"], result["AP75"]) == pytest.approx((100, 50))
