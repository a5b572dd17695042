"""COCO metrics: worked out by hand, equal in both libraries, from records and from files."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from dsrcnn.data.datasets.shapes import CLASSES, shapes_records
from dsrcnn.errors import DataError
from dsrcnn.evaluation import CocoEvaluator, build_evaluator

pytestmark = pytest.mark.usefixtures("clean_catalogs")

NAME = "evaluated_in_test"
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90"]


@pytest.fixture
def messages(caplog, monkeypatch):
    """Warnings of this package; set up loggers no longer propagate, so ours is made to."""
    monkeypatch.setattr(logging.getLogger("dsrcnn"), "propagate", True)
    return lambda: [
        r.getMessage()
        for r in caplog.records
        if r.name.startswith("dsrcnn") and r.levelno >= logging.WARNING
    ]


def register(records, classes=CLASSES, name=NAME):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(classes), evaluator_type="coco")


def image_of(objects, image_id=0, side=200, **extra):
    """A record with (label, x1, y1, x2, y2) as its objects."""
    return {
        "file_name": f"{image_id}.png",
        "image_id": image_id,
        "height": side,
        "width": side,
        "annotations": [
            {
                "bbox": list(box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": label,
                "iscrowd": 0,
                **extra,
            }
            for label, *box in objects
        ],
    }


def output_of(record, detections):
    """Model output with (label, score, x1, y1, x2, y2) as its detections."""
    instances = Instances((record["height"], record["width"]))
    table = torch.tensor(detections, dtype=torch.float64).reshape(-1, 6)
    instances.pred_classes = table[:, 0].long()
    instances.scores = table[:, 1]
    instances.pred_boxes = Boxes(table[:, 2:])
    return {"instances": instances}


def evaluate(records, detections, **options):
    """Metrics of detections, a list per record, on the data set under test."""
    evaluator = CocoEvaluator(NAME, **options)
    evaluator.reset()
    for record, found in zip(records, detections, strict=True):
        evaluator.process([record], [output_of(record, found)])
    return evaluator.evaluate()["bbox"]


def perfect(record):
    return [(a["category_id"], 0.9, *a["bbox"]) for a in record["annotations"]]


def measured_by_hand(objects, detections, **options):
    record = image_of(objects)
    register([record], ["one", "two"])
    return evaluate([record], [detections], **options)


# Values


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_perfect_predictions_have_an_ap_of_100(backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    records = shapes_records("val")[:12]
    register(records)
    result = evaluate(records, map(perfect, records), backend=backend)
    present = {CLASSES[a["category_id"]] for r in records for a in r["annotations"]}
    assert len(present) == 5
    for name in ("AP", "AP50", "AP75", *(f"AP-{c}" for c in present)):
        assert result[name] == pytest.approx(100)


OBJECT = (0, 10.0, 10.0, 110.0, 110.0)  # 100 x 100: large, for COCO


@pytest.mark.parametrize(
    ("detections", "ap50", "ap75", "ap", "large"),
    [
        # Two found at the same place: the one with the higher score counts, the other is false.
        pytest.param(
            [(0, 0.9, 10, 10, 110, 110), (0, 0.8, 10, 10, 110, 110)], 100, 100, 100, 100, id="twice"
        ),
        # The false one comes first: full recall is reached at a precision of 1/2. Among large
        # objects a false detection of medium size is ignored.
        pytest.param(
            [(0, 0.9, 150, 150, 190, 190), (0, 0.8, 10, 10, 110, 110)], 50, 50, 50, 100, id="2nd"
        ),
        # 100 x 62.5 of 100 x 100: IoU 0.625, right at 0.50, 0.55, 0.60 of ten thresholds.
        pytest.param([(0, 0.9, 10, 10, 110, 72.5)], 100, 0, 30, 30, id="loose"),
        # The better box has the lower score: below 0.625 the loose one takes the object, above it
        # the better one, which then comes second: (3 x 1 + 7 x 1/2) / 10. The loose one is medium.
        pytest.param(
            [(0, 0.9, 10, 10, 110, 72.5), (0, 0.8, 10, 10, 110, 110)], 100, 50, 65, 100, id="both"
        ),
        pytest.param([(1, 0.9, 10, 10, 110, 110)], 0, 0, 0, 0, id="another class"),
    ],
)
@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_one_object_is_measured_as_by_hand(detections, ap50, ap75, ap, large, backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    result = measured_by_hand([OBJECT], detections, backend=backend)
    found = {k: result[k] for k in ("AP50", "AP75", "AP", "APl", "AP-one")}
    expected = {"AP50": ap50, "AP75": ap75, "AP": ap, "APl": large, "AP-one": ap}
    assert found == pytest.approx(expected)
    for nothing_to_measure in ("APs", "APm", "AP-two"):
        assert math.isnan(result[nothing_to_measure])


@pytest.mark.parametrize(("bottom", "expected"), [(103, 100), (98, 0)])
def test_ap90_is_that_of_nearly_exact_boxes(bottom, expected):
    # 93 or 88 of 100 pixels of the height: IoU 0.93, right up to 0.9, and 0.88.
    result = measured_by_hand([OBJECT], [(0, 0.9, 10, 10, 110, bottom)])
    assert result["AP90"] == pytest.approx(expected)


def test_half_of_the_objects_found_gives_51_of_101_recall_points():
    # Precision is 1 at recalls 0, 0.01, ..., 0.5 and 0 beyond.
    objects = [OBJECT, (0, 120, 120, 190, 190)]
    result = measured_by_hand(objects, [(0, 0.9, *OBJECT[1:])])
    assert result["AP"] == pytest.approx(100 * 51 / 101)


def test_the_mean_is_over_classes_and_sizes_are_told_apart():
    small, medium = (0, 5, 5, 15, 15), (1, 20, 20, 70, 70)  # 10 x 10 and 50 x 50 pixels
    result = measured_by_hand([small, medium], [(1, 0.9, *medium[1:])])
    assert result["AP-one"] == 0
    assert result["AP-two"] == pytest.approx(100)
    assert result["AP"] == pytest.approx(50)
    assert (result["APs"], result["APm"]) == (0, pytest.approx(100))
    assert math.isnan(result["APl"])


def test_a_detection_on_a_crowd_is_not_counted():
    crowd = {**image_of([OBJECT])["annotations"][0], "iscrowd": 1}
    record = image_of([(0, 120, 120, 190, 190)])
    record["annotations"].append(crowd)
    register([record], ["one"])
    on_crowd, found = (0, 0.9, *OBJECT[1:]), (0, 0.8, 120, 120, 190, 190)
    assert evaluate([record], [[on_crowd, found]])["AP"] == pytest.approx(100)


def test_the_result_names_totals_then_classes():
    records = shapes_records("val")[:3]
    register(records)
    result = evaluate(records, map(perfect, records))
    assert list(result) == [*METRICS, *(f"AP-{c}" for c in CLASSES)]


def test_a_reset_forgets_detections():
    record = image_of([OBJECT])
    register([record], ["one"])
    evaluator = CocoEvaluator(NAME)
    evaluator.process([record], [output_of(record, [(0, 0.9, 150, 150, 190, 190)])])
    evaluator.reset()
    evaluator.process([record], [output_of(record, [(0, 0.8, *OBJECT[1:])])])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_no_detections_give_nan_and_a_warning(messages):
    record = image_of([OBJECT])
    register([record], ["one", "two"])
    result = evaluate([record], [[]])
    assert list(result) == [*METRICS, "AP-one", "AP-two"]
    assert all(math.isnan(v) for v in result.values())
    assert messages() == [f"{NAME}: the model made no detections."]


# Two libraries


def jittered(record, generator):
    """Detections near the objects and elsewhere, some of another class, with random scores."""
    side = np.array([record["width"], record["height"]])
    found = []
    for annotation in record["annotations"] * 2:
        box = np.array(annotation["bbox"]).reshape(2, 2)
        spread = 0.15 * (box[1] - box[0])
        box = np.clip(box + generator.normal(0, 1, (2, 2)) * spread, 0, side)
        label = annotation["category_id"] if generator.random() < 0.8 else generator.integers(5)
        found.append((int(label), generator.random(), *np.sort(box, axis=0).ravel()))
    for _ in range(3):
        corners = np.sort(generator.uniform(0, 1, (2, 2)), axis=0) * side
        found.append((int(generator.integers(5)), generator.random(), *corners.ravel()))
    return found


def test_both_libraries_give_the_same_numbers():
    pytest.importorskip("faster_coco_eval")
    generator = np.random.default_rng(0)
    records = shapes_records("val")[:30]
    records[3]["annotations"][0]["iscrowd"] = 1
    register(records)
    detections = [jittered(r, generator) for r in records]
    fast = evaluate(records, detections, backend="faster-coco-eval")
    slow = evaluate(records, detections, backend="pycocotools")
    assert fast == pytest.approx(slow, rel=1e-9, nan_ok=True)
    assert evaluate(records, detections) == pytest.approx(fast, rel=1e-12, nan_ok=True)
    assert 5 < slow["AP"] < slow["AP50"] < 95  # a case that could differ
    assert not math.isnan(slow["APs"])


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
