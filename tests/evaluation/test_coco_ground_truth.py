"""Ground truth of COCO metrics from records and files, files written, and the choice of metrics."""

import json
import math

import numpy as np
import pytest
from coco_cases import NAME, OBJECT, evaluate, image_of, jittered, perfect, register
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.errors import DataError
from dsrcnn.evaluation import CocoEvaluator, build_evaluator


@pytest.fixture
def register_file(tmp_path):
    """Registers a COCO file of records; label i is the i-th category."""

    def write(records, categories, *, reverse=False, **extra):
        annotations = []
        for record in records:
            for a in record["annotations"]:
                x1, y1, x2, y2 = a["bbox"]
                entry = {"id": len(annotations) + 1, "image_id": record["image_id"], "iscrowd": 0}
                entry |= {"category_id": categories[a["category_id"]]["id"], **extra}
                annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        keys = ("file_name", "height", "width")
        images = [{"id": r["image_id"], **{k: r[k] for k in keys}} for r in records]
        content = {"images": images, "annotations": annotations}
        content["categories"] = categories[::-1] if reverse else categories
        (tmp_path / "gt.json").write_text(json.dumps(content))
        register_coco_instances(NAME, {}, str(tmp_path / "gt.json"), "")

    return write


def test_ground_truth_from_a_file_equals_ground_truth_from_records(register_file):
    generator = np.random.default_rng(1)
    records = shapes_records("val")[:15]
    detections = [jittered(r, generator) for r in records]
    register(records)
    from_records = evaluate(records, detections)
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)
    register_file(records, [{"id": i + 1, "name": c} for i, c in enumerate(CLASSES)])
    assert evaluate(records, detections) == pytest.approx(from_records, rel=1e-12, nan_ok=True)


UNUSABLE = [(0, 20, 20, 20, 60), (0, math.nan, 20, 60, 60), (0, 230, 10, 260, 40)]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "records"])
@pytest.mark.parametrize("bad", UNUSABLE, ids=["no area", "not finite", "outside"])
def test_boxes_that_training_ignores_are_not_ground_truth(register_file, from_file, bad):
    record = image_of([bad, OBJECT])
    if from_file:
        register_file([record], [{"id": 1, "name": "one"}])
    else:
        register([record], ["one"])
    assert evaluate([record], [[(0, 0.9, *OBJECT[1:])]])["AP"] == pytest.approx(100)


@pytest.mark.parametrize("reverse", [False, True])
def test_labels_are_category_ids_in_ascending_order(tmp_path, register_file, reverse):
    records = [image_of([(0, 5, 5, 60, 60), (1, 70, 70, 150, 150), (2, 10, 100, 60, 190)])]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 20, "name": "bird"}]
    register_file(records, categories, reverse=reverse)
    result = evaluate(records, [perfect(records[0])[:2]], tmp_path)
    assert [result[f"AP-{c}"] for c in ("cat", "dog", "bird")] == pytest.approx([100, 100, 0])
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [d["category_id"] for d in written] == [3, 7]


def test_a_full_disk_costs_the_file_of_detections_but_not_the_metrics(tmp_path, caplog):
    record = image_of([OBJECT])
    register([record], ["one"])
    (tmp_path / "coco_instances_results.json").mkdir()  # cannot be written
    assert evaluate([record], [perfect(record)], tmp_path)["AP"] == pytest.approx(100)
    assert "coco_instances_results.json cannot be written" in caplog.text


def test_areas_in_the_file_decide_what_is_small(register_file):
    # With masks the official area is the mask's: here a thin object in a large box.
    records = [image_of([OBJECT])]
    register_file(records, [{"id": 1, "name": "one"}], area=500)
    result = evaluate(records, map(perfect, records))
    assert result["APs"] == pytest.approx(100)
    assert math.isnan(result["APl"])


def test_a_missing_ground_truth_file_is_named(tmp_path):
    register_coco_instances(NAME, {}, str(tmp_path / "absent.json"), "")
    with pytest.raises(DataError, match=r"absent\.json' does not exist"):
        CocoEvaluator(NAME)


def test_detections_are_written_in_the_format_of_coco_if_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record, detections = image_of([OBJECT], image_id=42), [(1, 0.75, 10, 20, 40, 60)]
    register([record], ["one", "two"])
    evaluate([record], [detections])
    assert list(tmp_path.iterdir()) == []
    evaluate([record], [detections], tmp_path / "new" / "folder")
    written = (tmp_path / "new" / "folder" / "coco_instances_results.json").read_text()
    assert json.loads(written) == [
        {"image_id": 42, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.75}
    ]


@pytest.mark.parametrize("kind", ["coco", None])
def test_coco_metrics_are_the_default_and_those_of_voc_are_for_voc(tmp_path, kind):
    register([image_of([OBJECT])])
    if kind is None:
        del MetadataCatalog.get(NAME).evaluator_type
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path))
    evaluator = build_evaluator(cfg, NAME)
    assert isinstance(evaluator, CocoEvaluator)
    assert evaluator.output_folder == tmp_path / "inference"
    assert isinstance(build_evaluator(cfg, "voc_2007_test"), PascalVOCDetectionEvaluator)


def test_a_data_set_of_an_unknown_type_is_refused():
    register([image_of([OBJECT])], kind="cityscapes")
    with pytest.raises(DataError) as caught:
        build_evaluator(tiny_cfg(), NAME)
    for part in (NAME, "'cityscapes'", "'coco'", "'crowdhuman'", "'lvis'", "'pascal_voc'"):
        assert part in str(caught.value)
