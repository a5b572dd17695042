"""Labels and images of COCO metrics are those of the dataset, which need not be all of its json."""

import json

import pytest
from coco_cases import NAME, OBJECT, evaluate, image_of, output_of
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator

from dsrcnn import load_cfg
from dsrcnn.data.datasets.custom import class_names
from dsrcnn.errors import DataError
from dsrcnn.evaluation import CocoEvaluator
from dsrcnn.evaluation.coco import coco_ground_truth
from dsrcnn.evaluation.errors import analyze_errors, collect_images, judge

TRAFFIC = {1: "person", 2: "bicycle", 3: "car"}
PARENT = {0: "cells", 1: "red", 2: "white"}  # an export of Roboflow


@pytest.fixture
def write(tmp_path):
    """Writes a json with an object 100 x 100 of category `number` in each of `images` images."""

    def write_json(categories, *numbers, images=1):
        entries = [
            {"id": 10 * i + n, "image_id": i, "category_id": n, "bbox": [10, 10, 100, 100]}
            for i in range(images)
            for n in numbers
        ]
        entries = [{**entry, "area": 10000, "iscrowd": 0} for entry in entries]
        sides = {"height": 200, "width": 200}
        listed = [{"id": i, "file_name": f"{i}.png", **sides} for i in range(images)]
        classes = [{"id": n, "name": c, "supercategory": "cells" if n else "none"}
                   for n, c in categories.items()]  # fmt: skip
        path = tmp_path / "gt.json"
        path.write_text(
            json.dumps({"images": listed, "annotations": entries, "categories": classes})
        )
        return str(path)

    return write_json


def register(json_file, records, **metadata):
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(json_file=json_file, evaluator_type="coco", **metadata)


def test_classes_that_are_a_part_of_the_json_are_measured_as_by_detectron2(write, tmp_path):
    record = image_of([OBJECT])
    register(
        write(TRAFFIC, 3), [record],
        thing_classes=["car"], thing_dataset_id_to_contiguous_id={3: 0},
    )  # fmt: skip
    found = [(0, 0.9, *OBJECT[1:])]
    theirs = COCOEvaluator(NAME, output_dir=str(tmp_path), use_fast_impl=False)
    theirs.reset()
    theirs.process([record], [output_of(record, found)])
    result = evaluate([record], [found], tmp_path)
    assert result["AP"] == pytest.approx(theirs.evaluate()["bbox"]["AP"]) == pytest.approx(100)
    assert [k for k in result if k.startswith("AP-")] == ["AP-car"]
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [d["category_id"] for d in written] == [3]


def test_objects_of_classes_that_the_dataset_leaves_out_do_not_count(write):
    record = image_of([OBJECT])
    mapping = {3: 0, 1: 1}
    register(
        write(TRAFFIC, 1, 2, 3), [record],
        thing_classes=["car", "person"], thing_dataset_id_to_contiguous_id=mapping,
    )  # fmt: skip
    result = evaluate([record], [[(0, 0.9, *OBJECT[1:])]])
    classes = {k: v for k, v in result.items() if k.startswith("AP-")}
    assert classes == pytest.approx({"AP-car": 100, "AP-person": 0})
    assert result["AP"] == pytest.approx(50)


def test_labels_follow_the_names_of_the_metadata_where_they_have_no_ids(write):
    record = image_of([OBJECT])
    register(write(TRAFFIC, 3), [record], thing_classes=["car", "person"])
    assert evaluate([record], [[(0, 0.9, *OBJECT[1:])]])["AP-car"] == pytest.approx(100)


def test_labels_of_detectron2s_reader_include_the_parent_that_roboflow_writes(write):
    json_file = write(PARENT, 1, 2)
    DatasetCatalog.register(NAME, lambda: load_coco_json(json_file, "", NAME))
    MetadataCatalog.get(NAME).set(json_file=json_file, evaluator_type="coco")
    assert class_names(NAME) == ["cells", "red", "white"]
    record = image_of([OBJECT])
    result = evaluate([record], [[(1, 0.9, *OBJECT[1:]), (2, 0.8, *OBJECT[1:])]])
    assert [result[f"AP-{c}"] for c in ("red", "white")] == pytest.approx([100, 100])
    assert result["AP"] == pytest.approx(100)


def test_the_class_count_of_a_config_is_that_of_the_function_and_not_of_the_json(write):
    json_file = write(PARENT, 1, 2)
    DatasetCatalog.register(NAME, lambda: load_coco_json(json_file, "", NAME))
    MetadataCatalog.get(NAME).set(json_file=json_file)
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", ()])
    assert cfg.MODEL.SparseRCNN.NUM_CLASSES == 3


@pytest.mark.parametrize(("metadata", "message"), [
    ({"thing_classes": ["auto"]}, r"names the class 'auto'.* has person, bicycle, car"),
    (
        {"thing_classes": ["car"], "thing_dataset_id_to_contiguous_id": {4: 0}},
        r"maps the category 4, .* has 1, 2, 3",
    ),
    (
        {"thing_classes": ["car"], "thing_dataset_id_to_contiguous_id": {3: 1}},
        r"maps categories to the labels 1, expected 0",
    ),
    (
        {"thing_classes": ["car"], "thing_dataset_id_to_contiguous_id": {3: 0, 1: 1}},
        r"maps categories to the labels 0, 1, expected 0",
    ),
])  # fmt: skip
def test_metadata_that_contradict_the_json_are_refused(write, metadata, message):
    register(write(TRAFFIC, 3), [image_of([OBJECT])], **metadata)
    with pytest.raises(DataError, match=message):
        CocoEvaluator(NAME)


def test_only_the_images_of_the_dataset_are_measured(write):
    record = image_of([OBJECT], image_id=1)
    register(write(TRAFFIC, 3, images=4), [record], thing_classes=list(TRAFFIC.values()))
    assert evaluate([record], [[(2, 0.9, *OBJECT[1:])]])["AP"] == pytest.approx(100)


def test_the_analysis_of_errors_has_the_labels_of_the_metrics(write):
    record = image_of([OBJECT])
    register(
        write(TRAFFIC, 1, 3), [record],
        thing_classes=["car"], thing_dataset_id_to_contiguous_id={3: 0},
    )  # fmt: skip
    found = {"image_id": 0, "category_id": 3, "bbox": [10, 10, 100, 100], "score": 0.9}
    (scene,) = collect_images(coco_ground_truth(NAME), [found])
    assert (scene.classes.tolist(), scene.labels.tolist()) == ([0], [0])
    assert analyze_errors([scene], [judge(scene)], classes=1).ap50 == pytest.approx(100)
