"""Ground truth of COCO metrics from records and files, what is written, and who is chosen."""

import json
import math

import numpy as np
import pytest
from coco_cases import (
    NAME,
    OBJECT,
    evaluate,
    image_of,
    jittered,
    measured_by_hand,
    perfect,
    register,
)
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.errors import DataError
from dsrcnn.evaluation import CocoEvaluator, build_evaluator

pytestmark = pytest.mark.usefixtures("clean_catalogs")


# Ground truth


def coco_file(path, records, categories):
    """`records` as a COCO file; label i becomes the i-th category."""
    annotations = []
    for record in records:
        for annotation in record["annotations"]:
            x1, y1, x2, y2 = annotation["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": categories[annotation["category_id"]]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": annotation["iscrowd"],
                }
            )
    images = [{"id": r["image_id"], **{k: r[k] for k in ("file_name", "height", "width")}}
              for r in records]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return str(path)


def test_ground_truth_from_a_file_equals_ground_truth_from_records(tmp_path):
    generator = np.random.default_rng(1)
    records = shapes_records("val")[:15]
    detections = [jittered(r, generator) for r in records]
    register(records)
    from_records = evaluate(records, detections)
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)
    categories = [{"id": i + 1, "name": c} for i, c in enumerate(CLASSES)]
    register_coco_instances(NAME, {}, coco_file(tmp_path / "gt.json", records, categories), "")
    from_file = evaluate(records, detections)
    assert from_file == pytest.approx(from_records, rel=1e-12, nan_ok=True)


UNUSABLE = [(0, 20, 20, 20, 60), (0, math.nan, 20, 60, 60), (0, 230, 10, 260, 40)]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "records"])
@pytest.mark.parametrize("bad", UNUSABLE, ids=["no area", "not finite", "outside"])
def test_boxes_that_training_leaves_out_are_not_expected_to_be_found(tmp_path, from_file, bad):
    record = image_of([bad, OBJECT])
    if from_file:
        path = coco_file(tmp_path / "gt.json", [record], [{"id": 1, "name": "one"}])
        register_coco_instances(NAME, {}, path, "")
    else:
        register([record], ["one"])
    assert evaluate([record], [[(0, 0.9, *OBJECT[1:])]])["AP"] == pytest.approx(100)


def test_labels_become_the_category_ids_of_the_file(tmp_path):
    records = [image_of([(0, 5, 5, 60, 60), (1, 70, 70, 150, 150), (2, 10, 100, 60, 190)])]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 20, "name": "bird"}]
    path = coco_file(tmp_path / "gt.json", records, categories)
    register_coco_instances(NAME, {}, path, "")
    result = evaluate(records, map(perfect, records), output_folder=tmp_path)
    assert [result[f"AP-{c}"] for c in ("cat", "dog", "bird")] == pytest.approx([100] * 3)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [d["category_id"] for d in written] == [3, 7, 20]


def test_class_names_follow_ascending_ids_not_the_order_in_the_file(tmp_path):
    records = [image_of([(0, 5, 5, 60, 60), (1, 70, 70, 150, 150)])]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    path = tmp_path / "gt.json"
    coco_file(path, records, categories)
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(path), "")
    result = evaluate(records, [[(0, 0.9, 5, 5, 60, 60)]])
    assert (result["AP-cat"], result["AP-dog"]) == (pytest.approx(100), 0)


def test_areas_of_the_file_decide_what_is_small(tmp_path):
    # With masks the official area is the mask's: here a thin object in a large box.
    path = tmp_path / "gt.json"
    records = [image_of([OBJECT])]
    coco_file(path, records, [{"id": 1, "name": "one"}])
    content = json.loads(path.read_text())
    content["annotations"][0]["area"] = 500
    path.write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(path), "")
    result = evaluate(records, map(perfect, records))
    assert result["APs"] == pytest.approx(100)
    assert math.isnan(result["APl"])


def test_a_missing_ground_truth_file_is_named(tmp_path):
    register_coco_instances(NAME, {}, str(tmp_path / "absent.json"), "")
    with pytest.raises(DataError, match=r"absent\.json' does not exist"):
        CocoEvaluator(NAME)


# Files written, and the choice of evaluator


def test_detections_are_written_in_cocos_format(tmp_path):
    record = image_of([OBJECT], image_id=42)
    register([record], ["one", "two"])
    evaluate([record], [[(1, 0.75, 10, 20, 40, 60)]], output_folder=tmp_path / "new" / "folder")
    written = (tmp_path / "new" / "folder" / "coco_instances_results.json").read_text()
    assert json.loads(written) == [
        {"image_id": 42, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.75}
    ]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured_by_hand([OBJECT], [(0, 0.9, *OBJECT[1:])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["coco", None])
def test_coco_metrics_are_chosen_for_coco_and_for_data_sets_of_no_type(tmp_path, kind):
    DatasetCatalog.register(NAME, lambda: [image_of([OBJECT])])
    MetadataCatalog.get(NAME).set(thing_classes=["one"])
    if kind:
        MetadataCatalog.get(NAME).evaluator_type = kind
    evaluator = build_evaluator(tiny_cfg("OUTPUT_DIR", str(tmp_path)), NAME)
    assert isinstance(evaluator, CocoEvaluator)
    assert evaluator.output_folder == tmp_path / "inference"


def test_voc_metrics_are_chosen_for_voc():
    evaluator = build_evaluator(tiny_cfg(), "voc_2007_test")
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)


def test_a_data_set_of_another_type_is_refused():
    register([image_of([OBJECT])], ["one"])
    MetadataCatalog.pop(NAME)
    MetadataCatalog.get(NAME).set(thing_classes=["one"], evaluator_type="cityscapes")
    with pytest.raises(DataError) as caught:
        build_evaluator(tiny_cfg(), NAME)
    for part in (NAME, "'cityscapes'", "'coco'", "'crowdhuman'", "'lvis'", "'pascal_voc'"):
        assert part in str(caught.value)
