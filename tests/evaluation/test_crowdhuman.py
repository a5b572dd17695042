"""CrowdHuman: conversion, metrics by hand, and training on the published file format."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from coco_cases import output_of
from conftest import REPOSITORY, SMALL, run_program, tiny_cfg, train
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dsrcnn.config import load_cfg
from dsrcnn.data.datasets import register_crowdhuman
from dsrcnn.data.datasets.crowdhuman import convert_crowdhuman
from dsrcnn.engine.main import run
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import DataError
from dsrcnn.evaluation import build_evaluator
from dsrcnn.evaluation import crowdhuman as crowdhuman_evaluation
from dsrcnn.evaluation.crowdhuman import CrowdImage, crowdhuman_metrics, jaccard_index, match_image

PERSON = [10.0, 10, 50, 90]
OTHER = [100.0, 10, 140, 90]
REGION = [150.0, 0, 200, 100]
FALSE = [60.0, 10, 90, 90]


def image(detections, persons=(PERSON, OTHER), ignored=(), width=200):
    """Detections are (score, box)."""
    return CrowdImage(
        *(width, 100, np.array([*persons, *ignored], dtype=float).reshape(-1, 4)),
        np.array([False] * len(persons) + [True] * len(ignored), dtype=bool),
        np.array([b for _, b in detections], dtype=float).reshape(-1, 4),
        np.array([s for s, _ in detections], dtype=float),
    )


def regions_first(scene):
    """The same image with its regions to ignore before the persons."""
    return scene._replace(persons=scene.persons[::-1], ignored=scene.ignored[::-1])


def test_metrics_by_hand():
    metrics = crowdhuman_metrics([image([(0.7, OTHER), (0.9, PERSON), (0.8, FALSE)])])
    # Right, false, right: recall 0.5 0.5 1, precision 1 1/2 2/3; one trapezoid of 0.5 counts.
    assert metrics["AP"] == pytest.approx(100 * 0.5 * (1 / 2 + 2 / 3) / 2)
    assert metrics["Recall"] == 100
    # The first rank with a false positive, for all nine rates: half is missed there.
    assert metrics["mMR"] == pytest.approx(50)
    assert metrics["JI"] == pytest.approx(100 * 2 / 3)  # with all three: 2 / (3 + 2 - 2)


def test_metrics_of_two_images_are_those_of_the_published_code():
    right, beside, again = [10.0, 10, 30, 50], [12.0, 10, 32, 50], [52.0, 12, 72, 52]
    detections = [(0.9, right), (0.8, beside), (0.7, [20.0, 65, 30, 85]), (0.6, again)]
    first = image(detections, [right, [50.0, 10, 70, 50]], [[0.0, 60, 100, 100]], width=100)
    detections = [(0.95, [0.0, 20, 30, 80]), (0.5, [80.0, 80, 90, 90])]
    second = image(detections, [[-10.0, 20, 30, 80], [60.0, 20, 80, 40]], width=100)
    metrics = crowdhuman_metrics([first, second])
    assert metrics["AP"] == pytest.approx(42.70833, abs=1e-4)
    assert metrics["mMR"] == pytest.approx(42.86220, abs=1e-4)
    assert metrics["Recall"] == pytest.approx(75)


def test_false_positives_are_counted_per_image():
    images = [image([(0.9, PERSON), (0.8, FALSE)], [PERSON]), image([(0.5, PERSON)], [PERSON])]
    # FPPI 0, 0.5, 0.5; recall 0.5, 0.5, 1: up to 0.3162 and 0.5 the second rank, then the last.
    expected = np.exp(np.mean(np.log([0.5] * 7 + [1e-10] * 2)))
    metrics = crowdhuman_metrics(images)
    assert metrics["mMR"] == pytest.approx(100 * expected, rel=1e-6)
    assert metrics["AP"] == pytest.approx(100 * 0.5 * (1 / 2 + 2 / 3) / 2)


def test_a_person_is_matched_once_and_with_enough_overlap():
    twice = image([(0.9, PERSON), (0.8, PERSON)], [PERSON])
    assert [x.tolist() for x in match_image(twice)] == [[True, True], [True, False]]
    half = image([(0.9, [10, 10, 50, 50])], [PERSON])  # IoU 0.5, not above it
    assert match_image(half)[1].tolist() == [False]


def test_detections_in_a_region_to_ignore_do_not_count():
    # The third lies half in it, which is not more than half.
    inside = [[150.0, 0, 180, 90], [160.0, 10, 199, 90], [140.0, 0, 160, 50]]
    scene = image([(0.9, b) for b in inside] + [(0.5, PERSON)], [PERSON], [REGION])
    counted, correct = match_image(scene)
    assert counted.tolist() == [False, False, True, True]
    assert correct.tolist() == [False, False, False, True]
    assert jaccard_index([scene]) == pytest.approx(1 / 2)  # one match, one false
    assert crowdhuman_metrics([regions_first(scene)]) == crowdhuman_metrics([scene])


def test_persons_are_preferred_to_regions_and_boxes_are_clipped_to_the_image():
    over = image([(0.9, PERSON)], [PERSON], [[0.0, 0, 100, 100]])
    assert crowdhuman_metrics([regions_first(over)])["Recall"] == 100
    clipped = image([(0.9, [0, 10, 40, 100])], [[-40.0, 10, 40, 120]])  # 0 10 40 100 in the image
    assert crowdhuman_metrics([clipped])["Recall"] == 100


def test_the_jaccard_index_maximizes_the_number_of_matches():
    # Each of two detections overlaps the first person; only one of them the second.
    persons = [[0.0, 0, 100, 100], [30.0, 0, 130, 100]]
    both, first = [15.0, 0, 115, 100], [0.0, 0, 90, 100]
    assert jaccard_index([image([(0.9, both), (0.8, first)], persons)]) == 1


def test_metrics_are_defined_without_detections_and_nan_without_persons():
    metrics = crowdhuman_metrics([image([])])
    assert metrics == {"AP": 0, "Recall": 0, "mMR": 100, "JI": 0}
    assert all(np.isnan(v) for v in crowdhuman_metrics([image([(0.9, FALSE)], [])]).values())


@pytest.fixture
def miniature(tmp_path):
    """Published files of two splits of three images, with a region to ignore in each."""
    person = {"fbox": [10, 10, 40, 80], "vbox": [12, 12, 30, 60], "hbox": [20, 10, 10, 10]}
    region = {"fbox": [-20, 0, 50, 100], "vbox": [0, 0, 30, 100], "hbox": [0, 0, 5, 5]}
    people = [
        {"tag": "person", **person, "extra": {"box_id": 0, "occ": 0}},
        {"tag": "mask", **region, "extra": {"ignore": 1}},
    ]
    for split in ("train", "val"):
        folder = tmp_path / "crowdhuman" / f"CrowdHuman_{split}"
        folder.mkdir(parents=True)
        lines = [json.dumps({"ID": f"{split},{i}", "gtboxes": people}) for i in range(3)]
        (tmp_path / f"annotation_{split}.odgt").write_text("\n".join(lines) + "\n")
        for i in range(3):
            pixels = np.full((100, 200, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(folder / f"{split},{i}.jpg")
    return tmp_path


def files_of(folder, split):
    """Annotations and images as published, and the json to write."""
    root = folder / "crowdhuman"
    output = root / f"annotations/{split}.json"
    return folder / f"annotation_{split}.odgt", root / f"CrowdHuman_{split}", output


def convert(folder, split, **options):
    counts = convert_crowdhuman(*files_of(folder, split), **options)
    return counts, json.loads(files_of(folder, split)[-1].read_text())


def test_published_files_become_coco(miniature):
    counts, content = convert(miniature, "train")
    assert counts == {"images": 3, "persons": 3, "ignored": 3}
    expected = {"id": 2, "file_name": "train,1.jpg", "width": 200, "height": 100}
    assert content["images"][1] == expected
    first, second = content["annotations"][:2]
    assert first["bbox"] == [10, 10, 40, 80]
    assert (first["area"], first["iscrowd"], first["bbox_vis"]) == (3200, 0, [12, 12, 30, 60])
    assert (second["bbox"], second["iscrowd"]) == ([-20, 0, 50, 100], 1)  # not clipped
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert content["categories"] == [{"id": 1, "name": "person"}]


def test_other_boxes_can_be_chosen_and_a_missing_file_is_named(miniature):
    for box, expected in (("vbox", [12, 12, 30, 60]), ("hbox", [20, 10, 10, 10])):
        assert convert(miniature, "train", box=box)[1]["annotations"][0]["bbox"] == expected
    with pytest.raises(DataError, match="box is 'body'; write one of fbox, vbox, hbox"):
        convert(miniature, "train", box="body")
    (miniature / "annotation_train.odgt").unlink()
    with pytest.raises(DataError, match="does not exist"):
        convert(miniature, "train")


@pytest.mark.parametrize(("line", "words"), [
    ("{", "line 1 is not valid JSON"), ('{"name": 3}', "lacks ID or gtboxes"),
    ('{"ID": "train,0", "gtboxes": [{"vbox": [1, 2, 3, 4]}]}', "lacks fbox with four numbers"),
    ('{"ID": "nowhere", "gtboxes": []}', r"nowhere.jpg of .* cannot be read .*correct --images"),
    ("\n\n{", "line 3 is not valid JSON"),
    ('{"ID": "train,0", "gtboxes": [{"extra": null, "fbox": [1]}]}', "lacks fbox with four"),
])  # fmt: skip
def test_broken_files_are_one_message(miniature, line, words):
    (miniature / "annotation_train.odgt").write_text(line)
    with pytest.raises(DataError, match=words):
        convert(miniature, "train")


@pytest.fixture
def registered(miniature, monkeypatch):
    """The two datasets, below the miniature's folder."""

    def register():
        for split in ("train", "val"):
            for name in (f"crowdhuman_{split}", f"CrowdHuman_{split}"):
                DatasetCatalog.pop(name)
                MetadataCatalog.pop(name)
        register_crowdhuman()

    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(miniature))
        register()
        yield miniature
    register()


@pytest.mark.slow
def test_published_files_can_be_converted_trained_on_and_evaluated(registered, tmp_path):
    tool = REPOSITORY / "tools/convert_crowdhuman.py"
    for split in ("train", "val"):
        printed = run_program(sys.executable, tool, *files_of(registered, split))
        assert "3 images, 3 persons, 3 ignored" in printed
    options = [*SMALL, "MODEL.SparseRCNN.NUM_CLASSES", "1", "OUTPUT_DIR", str(tmp_path / "out")]
    config = ["--config-file", "crowdhuman/sparse_rcnn_R50_500pro_50e"]
    assert run([*config, *options, "LOG.IMAGES", "0"]) == 0
    detections = json.loads((tmp_path / "out/inference/detections.json").read_text())
    assert set(detections) == {"1", "2", "3"}


@pytest.mark.parametrize("evaluator", ["crowdhuman", "coco"])
def test_more_than_100_detections_of_an_image_are_made_written_and_counted(
    registered, tmp_path, evaluator
):
    """A step with 500 proposals, then CrowdHuman's metrics and COCO's, whose usual limit is 100."""
    files = [files_of(registered, split) for split in ("train", "val")]
    for split in ("train", "val"):
        convert(registered, split)
    options = [*SMALL, "OUTPUT_DIR", str(tmp_path / "out"), "LOG.IMAGES", "0"]
    options += ["MODEL.SparseRCNN.NUM_CLASSES", "1", "MODEL.SparseRCNN.NUM_PROPOSALS", "500"]
    options += ["MODEL.SparseRCNN.PROPOSALS.BOXES", "random", "SOLVER.MAX_ITER", "1"]
    options += ["TEST.DETECTIONS_PER_IMAGE", "500", "TEST.MAX_DETECTIONS", "500"]
    if evaluator == "coco":
        options += ["DATASETS.CUSTOM.NAME", "crowd"]
        for part, (_, images, output) in zip(("TRAIN", "TEST"), files, strict=True):
            options += [f"DATASETS.CUSTOM.{part}_JSON", str(output)]
            options += [f"DATASETS.CUSTOM.{part}_IMAGES", str(images)]
    trainer = train(load_cfg("crowdhuman/sparse_rcnn_R50_500pro_50e", options))
    results = Trainer.test(trainer.cfg, trainer.model)["bbox"]
    if evaluator == "coco":
        rows = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
        counts = [*Counter(row["image_id"] for row in rows).values()]
        assert 0 <= results["AR100"] <= results["AR500"]
    else:
        content = json.loads((tmp_path / "out/inference/detections.json").read_text())
        counts = [len(scores) for _, scores in content.values()]
        assert results["Recall"] >= 0
    assert len(counts) == 3
    assert all(100 < count <= 500 for count in counts)


def evaluator_of(images):
    """An evaluator with a detection of the person of some images."""
    evaluator = build_evaluator(tiny_cfg(), "crowdhuman_val")
    evaluator.reset()
    output = output_of({"height": 100, "width": 200}, [(0, 0.9, 10, 10, 50, 90)])
    for number in images:
        evaluator.process([{"image_id": number}], [output])
    return evaluator


@pytest.mark.parametrize("processes", [[(1, 2, 2)], [(1, 2), (2,)]], ids=["one", "two"])
def test_the_evaluator_counts_every_image_once(registered, monkeypatch, processes):
    # A sampler may repeat an image to give all processes the same number; the third has no output.
    convert(registered, "val")
    evaluators = [evaluator_of(images) for images in processes]
    parts = [evaluator._detections for evaluator in evaluators]
    monkeypatch.setattr(crowdhuman_evaluation.comm, "gather", lambda _: parts)
    result = evaluators[0].evaluate()["bbox"]
    assert (result["Recall"], result["JI"]) == pytest.approx((100 * 2 / 3, 100 * 2 / 3))


def test_only_the_main_process_has_the_result(registered, monkeypatch):
    convert(registered, "val")
    monkeypatch.setattr(crowdhuman_evaluation.comm, "gather", lambda _: [])
    monkeypatch.setattr(crowdhuman_evaluation.comm, "is_main_process", lambda: False)
    assert evaluator_of([1]).evaluate() == {}


def test_detections_that_cannot_be_written_do_not_end_a_training(registered, tmp_path, caplog):
    convert(registered, "val")
    evaluator = evaluator_of([1, 2])
    evaluator.output_folder = tmp_path / "file"
    (tmp_path / "file").write_text("in the way")
    assert evaluator.evaluate()["bbox"]["Recall"] > 0
    assert "detections.json cannot be written" in caplog.text
