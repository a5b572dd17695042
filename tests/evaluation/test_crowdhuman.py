"""CrowdHuman: conversion, metrics by hand, evaluation, and the whole chain on a miniature set."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from dsrcnn.data.datasets import crowdhuman, register_crowdhuman
from dsrcnn.data.datasets.crowdhuman import convert_crowdhuman
from dsrcnn.engine.main import run
from dsrcnn.errors import DataError
from dsrcnn.evaluation import build_evaluator
from dsrcnn.evaluation import crowdhuman as crowdhuman_evaluation
from dsrcnn.evaluation.crowdhuman import CrowdImage, crowdhuman_metrics, jaccard_index, match_image

PERSON = [10.0, 10, 50, 90]
OTHER = [100.0, 10, 140, 90]
REGION = [150.0, 0, 200, 100]
FALSE = [60.0, 10, 90, 90]


def image(detections, persons=(PERSON, OTHER), ignored=()):
    """Detections are (score, box); regions to ignore stand first, to be sorted behind persons."""
    boxes = [*ignored, *persons]
    return CrowdImage(
        200, 100,
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array([True] * len(ignored) + [False] * len(persons), dtype=bool),
        np.array([b for _, b in detections], dtype=float).reshape(-1, 4),
        np.array([s for s, _ in detections], dtype=float),
    )  # fmt: skip


def test_metrics_by_hand():
    found = crowdhuman_metrics([image([(0.7, OTHER), (0.9, PERSON), (0.8, FALSE)])])
    # Right, false, right: recall 0.5 0.5 1, precision 1 1/2 2/3; one trapezoid of 0.5 counts.
    assert found["AP"] == pytest.approx(100 * 0.5 * (1 / 2 + 2 / 3) / 2)
    assert found["Recall"] == 100
    # The first rank with a false positive, for all nine numbers: half is missed there.
    assert found["mMR"] == pytest.approx(50)
    assert found["JI"] == pytest.approx(100 * 2 / 3)  # with all three: 2 / (3 + 2 - 2)


def test_published_numbers_of_two_images():
    region = [0.0, 60, 100, 100]
    right, beside, again = [10.0, 10, 30, 50], [12.0, 10, 32, 50], [52.0, 12, 72, 52]
    first = image(
        [(0.9, right), (0.8, beside), (0.7, [20.0, 65, 30, 85]), (0.6, again)],
        [right, [50.0, 10, 70, 50]],
        [region],
    )
    order = np.argsort(first.ignored, kind="stable")
    first = first._replace(persons=first.persons[order], ignored=first.ignored[order], width=100)
    second = image(
        [(0.95, [0.0, 20, 30, 80]), (0.5, [80.0, 80, 90, 90])],
        [[-10.0, 20, 30, 80], [60.0, 20, 80, 40]],
    )._replace(width=100)
    found = crowdhuman_metrics([first, second])
    assert found["AP"] == pytest.approx(42.70833, abs=1e-4)
    assert found["mMR"] == pytest.approx(42.86220, abs=1e-4)
    assert found["Recall"] == pytest.approx(75)


def test_false_positives_are_counted_per_image():
    images = [image([(0.9, PERSON), (0.8, FALSE)], [PERSON]), image([(0.5, PERSON)], [PERSON])]
    # FPPI 0, 0.5, 0.5; recall 0.5, 0.5, 1: up to 0.3162 and 0.5 the second rank, then the last.
    expected = np.exp(np.mean(np.log([0.5] * 7 + [1e-10] * 2)))
    found = crowdhuman_metrics(images)
    assert found["mMR"] == pytest.approx(100 * expected, rel=1e-6)
    assert found["AP"] == pytest.approx(100 * 0.5 * (1 / 2 + 2 / 3) / 2)


def test_a_person_is_found_once_and_by_enough_overlap():
    twice = image([(0.9, PERSON), (0.8, PERSON)], [PERSON])
    assert [x.tolist() for x in match_image(twice)] == [[True, True], [True, False]]
    half = image([(0.9, [10, 10, 50, 50])], [PERSON])  # IoU 0.5, not above it
    assert match_image(half)[1].tolist() == [False]


def test_detections_in_a_region_to_ignore_do_not_count_however_many():
    inside = [[150.0, 0, 180, 90], [160.0, 10, 199, 90], [140.0, 0, 160, 50]]
    scene = image([(0.9, b) for b in inside] + [(0.5, PERSON)], [PERSON], [REGION])
    # The third lies half in it, which is not more than half. Persons come first when sorted.
    order = np.argsort(scene.ignored, kind="stable")
    scene = scene._replace(persons=scene.persons[order], ignored=scene.ignored[order])
    counts, right = match_image(scene)
    assert counts.tolist() == [False, False, True, True]
    assert right.tolist() == [False, False, False, True]
    assert jaccard_index([scene]) == pytest.approx(1 / 2)  # one match, one false


def test_persons_are_preferred_to_regions():
    over = image([(0.9, PERSON)], [PERSON], [[0.0, 0, 100, 100]])
    assert crowdhuman_metrics([over])["Recall"] == 100


def test_boxes_are_clipped_to_the_image():
    person = [-40.0, 10, 40, 120]  # 0 10 40 100 in the image
    scene = image([(0.9, [0, 10, 40, 100])], [person])
    assert crowdhuman_metrics([scene])["Recall"] == 100


def test_the_jaccard_index_matches_as_many_as_possible():
    # Each of two detections overlaps the first person; only one of them the second.
    persons = [[0.0, 0, 100, 100], [30.0, 0, 130, 100]]
    both, first = [15.0, 0, 115, 100], [0.0, 0, 90, 100]
    assert jaccard_index([image([(0.9, both), (0.8, first)], persons)]) == 1


def test_nothing_found_and_nobody_there():
    found = crowdhuman_metrics([image([])])
    assert (found["AP"], found["Recall"], found["mMR"], found["JI"]) == (0, 0, 100, 0)
    assert all(np.isnan(v) for v in crowdhuman_metrics([image([(0.9, FALSE)], [])]).values())


@pytest.fixture
def miniature(tmp_path):
    """Published files of two splits of three images, with a region to ignore in each."""
    for split, name in (("train", "CrowdHuman_train"), ("val", "CrowdHuman_val")):
        folder = tmp_path / "crowdhuman" / name
        folder.mkdir(parents=True)
        lines = []
        for number in range(3):
            key = f"{split},{number}"
            Image.fromarray(np.full((100, 200, 3), 40 * number, np.uint8)).save(
                folder / f"{key}.jpg"
            )
            people = [
                {"tag": "person", "fbox": [10, 10, 40, 80], "vbox": [12, 12, 30, 60],
                 "hbox": [20, 10, 10, 10], "extra": {"box_id": 0, "occ": 0}},
                {"tag": "mask", "fbox": [-20, 0, 50, 100], "vbox": [0, 0, 30, 100],
                 "hbox": [0, 0, 5, 5], "extra": {"ignore": 1}},
            ]  # fmt: skip
            lines.append(json.dumps({"ID": key, "gtboxes": people}))
        (tmp_path / f"annotation_{split}.odgt").write_text("\n".join(lines) + "\n")
    return tmp_path


def convert(folder, split, **options):
    images = folder / f"crowdhuman/CrowdHuman_{split}"
    output = folder / f"crowdhuman/annotations/{split}.json"
    counts = convert_crowdhuman(folder / f"annotation_{split}.odgt", images, output, **options)
    return counts, json.loads(output.read_text())


def test_published_files_become_coco(miniature):
    counts, content = convert(miniature, "train")
    assert counts == {"images": 3, "persons": 3, "ignored": 3}
    assert content["images"][1] == {
        **{"id": 2, "file_name": "train,1.jpg", "width": 200, "height": 100}
    }
    first, second = content["annotations"][:2]
    assert first["bbox"] == [10, 10, 40, 80]
    assert (first["area"], first["iscrowd"], first["bbox_vis"]) == (3200, 0, [12, 12, 30, 60])
    assert (second["bbox"], second["iscrowd"]) == ([-20, 0, 50, 100], 1)  # not clipped
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert content["categories"] == [{"id": 1, "name": "person"}]


@pytest.mark.parametrize(
    ("box", "expected"), [("vbox", [12, 12, 30, 60]), ("hbox", [20, 10, 10, 10])]
)
def test_other_boxes_can_be_chosen(miniature, box, expected):
    assert convert(miniature, "train", box=box)[1]["annotations"][0]["bbox"] == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not valid JSON"),
        ('{"name": 3}', "lacks ID or gtboxes"),
        ('{"ID": "train,0", "gtboxes": [{"vbox": [1, 2, 3, 4]}]}', "lacks fbox with four numbers"),
        ('{"ID": "nowhere", "gtboxes": []}', r"nowhere.jpg of .* cannot be read"),
    ],
)
def test_broken_files_are_one_message(miniature, line, words):
    (miniature / "annotation_train.odgt").write_text(line)
    with pytest.raises(DataError, match=words):
        convert(miniature, "train")


def test_a_wrong_box_and_a_missing_file_are_named(miniature):
    with pytest.raises(DataError, match="box is 'body'; write one of fbox, vbox, hbox"):
        convert(miniature, "train", box="body")
    (miniature / "annotation_train.odgt").unlink()
    with pytest.raises(DataError, match="does not exist"):
        convert(miniature, "train")


@pytest.fixture
def registered(miniature, monkeypatch):
    """The two data sets, below the miniature's folder."""
    names = ("crowdhuman_train", "crowdhuman_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(miniature))
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_crowdhuman()
    yield miniature
    monkeypatch.undo()
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_crowdhuman()


@pytest.mark.parametrize("config", ["sparse_rcnn_R50_500pro_50e", "asag_s_R50_50e"])
def test_the_chain_runs_from_published_files_to_metrics(registered, tmp_path, config):
    tool = REPOSITORY / "tools/convert_crowdhuman.py"
    for split in ("train", "val"):
        files = [
            registered / f"annotation_{split}.odgt",
            registered / f"crowdhuman/CrowdHuman_{split}",
        ]
        output = registered / f"crowdhuman/annotations/{split}.json"
        done = subprocess.run(
            [sys.executable, tool, *files, output], capture_output=True, text=True, check=True
        )
        assert "3 images, 3 persons, 3 ignored" in " ".join(
            done.stdout.replace("images:", "").split()
        ).replace(",", ",")
    options = [*SMALL, "MODEL.SparseRCNN.NUM_CLASSES", "1", "OUTPUT_DIR", str(tmp_path / "out")]
    if config.startswith("asag"):
        options += ["MODEL.ASAG.ANCHORS.HIDDEN", "32"]
    assert run(["--config-file", f"crowdhuman/{config}", *options, "LOG.IMAGES", "0"]) == 0
    detections = json.loads((tmp_path / "out/inference/detections.json").read_text())
    assert set(detections) == {"1", "2", "3"}


def evaluator_of(images):
    """One that has found the first person of some images."""
    evaluator = build_evaluator(tiny_cfg(), "crowdhuman_val")
    evaluator.reset()
    found = Instances((100, 200))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 50, 90]]))
    found.scores = torch.tensor([0.9])
    for number in images:
        evaluator.process([{"image_id": number}], [{"instances": found}])
    return evaluator


@pytest.mark.parametrize("processes", [[(1, 2, 2)], [(1, 2), (2,)]], ids=["one", "two"])
def test_the_evaluator_counts_every_image_once(registered, monkeypatch, processes):
    """A sampler may repeat an image, so that processes have as many; the third is not looked at."""
    convert(registered, "val")
    evaluators = [evaluator_of(images) for images in processes]
    parts = [evaluator._detections for evaluator in evaluators]
    monkeypatch.setattr(crowdhuman_evaluation.comm, "gather", lambda own: parts)
    result = evaluators[0].evaluate()["bbox"]
    assert result["Recall"] == pytest.approx(100 * 2 / 3)
    assert result["JI"] == pytest.approx(100 * 2 / 3)
    assert crowdhuman._FILES.keys() == {"crowdhuman_train", "crowdhuman_val"}


def test_the_main_process_alone_has_the_result(registered, monkeypatch):
    convert(registered, "val")
    evaluator = evaluator_of([1])
    monkeypatch.setattr(crowdhuman_evaluation.comm, "gather", lambda own: [])
    monkeypatch.setattr(crowdhuman_evaluation.comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() == {}
