"""Odd COCO files: each is refused in one line by training and by the check, or works fully."""

import json
import sys

import pytest
from conftest import REPOSITORY, quick_cfg, train
from data_cases import (
    COUNT,
    boxes_of,
    check,
    coco_content,
    load,
    perfect_ap,
    write_coco,
    write_images,
)
from detectron2.data.datasets import register_coco_instances

from dsrcnn.data.build import load_records
from dsrcnn.errors import DataError

CASES = REPOSITORY.parent / "shared/cases"
UUID = "0b9c2f6e-8f0e-4d5c-9a53-0d1c5c7f3a11"
DEEP = b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE = 10**400


def edited(part, changes, entry=0):
    """The content with some values of an entry changed; `...` leaves the key out."""
    content = coco_content()
    target = content[part][entry]
    target.update(changes)
    for key in [key for key, value in target.items() if value is ...]:
        del target[key]
    return content


REFUSED = [
    *(("images", {"id": v}, r"images\[0\] has id .*expected an integer or text")
      for v in (True, 1.5, [1], {"a": 1}, float("nan"), float("inf"), "  ")),
    *(("images", {"id": v}, r"images\[0\] lacks id") for v in (None, "", [], ...)),
    ("images", {"id": 2}, "several images have the id 2"),
    ("images", {"id": 2.0}, "several images have the id 2"),
    *(("images", {"width": v}, r"images\[0\] has width .*expected pixels as an integer from 1")
      for v in ("96", 0, -96, 96.5, True, [96], HUGE, 1e9, float("nan"), float("inf"))),
    ("images", {"height": "80px"}, r"images\[0\] has height .*expected pixels"),
    *(("images", {"height": v}, r"images\[0\] lacks height") for v in (None, "", ...)),
    *(("images", {"file_name": v}, r"images\[0\] has file_name .*expected text")
      for v in (1, 1.5, True, ["1.jpg"], {"name": "1.jpg"}, "1\0.jpg", "1\n.jpg", "\ud800.jpg")),
    *(("images", {"file_name": v}, r"images\[0\] lacks file_name") for v in (None, "", ...)),
    *(("images", {"file_name": v}, "1 of 3 images of .* do not exist")
      for v in ("absent.jpg", "/nowhere/1.jpg", "C:\\data\\1.jpg", "..", ".", "x" * 5000)),
    *(("annotations", {"id": v}, r"annotations\[0\] has id .*expected an integer or text")
      for v in (True, 0.5, [1])),
    *(("annotations", {"id": v}, r"annotations\[0\] lacks id") for v in (None, ...)),
    ("annotations", {"id": 2}, "several annotations have the id 2"),
    *(("annotations", {"image_id": v}, r"annotations\[0\] has image_id")
      for v in (True, 1.5, [1], {})),
    *(("annotations", {"category_id": v}, r"annotations\[0\] has category_id")
      for v in (False, 1.5, [1])),
    *(("annotations", {"category_id": v}, "annotation 1 has category .*not listed in categories")
      for v in (9, 0, -1, "1", "left")),
    *(("annotations", {"bbox": v}, r"annotations\[0\] has bbox .*expected four numbers")
      for v in (5, "1 2 3 4", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, "30", 4], [1, 2, None, 4],
                [1, 2, True, 4], [[1, 2, 3, 4]], {"x": 1, "y": 2, "w": 3, "h": 4})),
    *(("annotations", {"bbox": v}, r"annotations\[0\] lacks bbox") for v in (None, [], "", ...)),
    ("annotations", {"bbox": [1, 2, HUGE, 4], "area": ...}, "too large"),
    *(("annotations", {"iscrowd": v}, r"annotations\[0\] has iscrowd .*expected 0 or 1")
      for v in (None, -1, 2, 0.5, "no", "", "true", [], {"a": 0})),
    *(("annotations", {"ignore": v}, r"annotations\[0\] has ignore .*expected 0 or 1")
      for v in (None, 2, "yes")),
    *(("categories", {"id": v}, r"categories\[0\] has id") for v in (True, 1.5, [1])),
    ("categories", {"id": 2}, "several categories have the id 2"),
    *(("categories", {"name": v}, r"categories\[0\] has name .*expected text in quotes")
      for v in (5, True, 1.0, ["cat"], "  ", "ca\tt", "ca\0t")),
    *(("categories", {"name": v}, r"categories\[0\] lacks name") for v in (None, "", ...)),
    ("categories", {"name": "right"}, "has the class name 'right' twice"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "changes", "phrase"), REFUSED)
def test_odd_value_is_refused_with_its_place(tmp_path, capsys, part, changes, phrase):
    folder = write_coco(tmp_path / "cells", edited(part, changes))
    with pytest.raises(DataError, match=phrase) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "instances_train.json" in str(caught.value)
    assert check(folder, capsys)[0] != 0


def dump(**changes):
    content = {**coco_content(), **changes}
    return json.dumps({k: v for k, v in content.items() if v is not ...}).encode()


def every(part, **changes):
    entries = coco_content()[part]
    return dump(**{part: [{**entry, **changes} for entry in entries]})


FILES = [
    (b"", "is not valid JSON"), (b"{", "is not valid JSON"), (b"\x00" * 50, "is not valid JSON"),
    (b"\xff\xfe\x00", "is not valid JSON"), (b"<annotation/>", "is not valid JSON"),
    (b"images: []", "is not valid JSON"), (b"9" * 10_000, "is not valid JSON"),
    (DEEP, "is nested too deeply"), (b"[" * 100 + b"]" * 100, "lacks images"),
    (b"[]", "lacks images, annotations, categories"), (b"null", "lacks images"),
    (b"5", "lacks images"), (b'"images"', "lacks images"), (b"{}", "lacks images"),
    (dump(images=...), "lacks images"), (dump(images={}), "lacks images"),
    (dump(annotations=...), "lacks annotations"), (dump(annotations={}), "lacks annotations"),
    (dump(annotations=None), "lacks annotations"), (dump(categories=...), "lacks categories"),
    (dump(categories="cat"), "lacks categories"), (dump(categories=[]), "empty list of categories"),
    (dump(images=[], annotations=[]), "lists no images"), (dump(images=[]), "lists no images"),
    (dump(images=["1.jpg"]), r"images\[0\] is '1.jpg'; expected an object"),
    (dump(annotations=[5]), r"annotations\[0\] is 5; expected an object"),
    (dump(categories=["cat"]), r"categories\[0\] is 'cat'; expected an object"),
    (dump(annotations=[]), "no box that can be used"),
    (every("annotations", bbox=[1, 2, 0, 0]), "no box that can be used"),
    (every("annotations", bbox=[float("nan")] * 4), "no box that can be used"),
    (every("annotations", bbox=[500, 500, 9, 9]), "no box that can be used"),
    (every("annotations", bbox=[1e30, 1, 5, 5]), "no box that can be used"),
    (every("annotations", bbox=[5, 5, -3, -3]), "no box that can be used"),
    (every("annotations", iscrowd=1), r"no box that can be used \(6 are crowds or ignored\)"),
    (every("annotations", iscrowd="1"), "6 are crowds"),
    (every("annotations", ignore=1), "6 are crowds or ignored"),
    (every("annotations", image_id="1"), "no box that can be used"),
    (every("images", width=0), r"images\[0\] has width 0"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "phrase"), FILES)
def test_odd_file_is_refused(tmp_path, capsys, content, phrase):
    folder = write_coco(tmp_path / "cells", content)
    with pytest.raises(DataError, match=phrase) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "instances_train.json" in str(caught.value)
    assert check(folder, capsys)[0] != 0


def renamed(images=None, categories=None, annotations=None):
    """The content with ids replaced by functions of them."""
    content = coco_content()
    for image in content["images"]:
        image["id"] = images(image["id"]) if images else image["id"]
    for category in content["categories"]:
        category["id"] = categories(category["id"]) if categories else category["id"]
    for entry in content["annotations"]:
        entry["id"] = annotations(entry["id"]) if annotations else entry["id"]
        entry["image_id"] = images(entry["image_id"]) if images else entry["image_id"]
        entry["category_id"] = (categories or int)(entry["category_id"])
    return content


def all_annotations(**changes):
    return edited_all("annotations", changes)


def edited_all(part, changes):
    content = coco_content()
    for entry in content[part]:
        entry.update(changes)
        for key in [key for key, value in entry.items() if value is ...]:
            del entry[key]
    return content


def many_classes():
    content = coco_content()
    content["categories"] += [{"id": n, "name": f"class {n}"} for n in range(3, 1200)]
    return content


def roboflow():
    content = coco_content()
    for category in content["categories"]:
        category["supercategory"] = "cells"
    content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
    return content


def swapped():
    content = coco_content()
    return {**content, "images": content["images"][::-1], "categories": content["categories"][::-1]}


ACCEPTED = {
    "plain": coco_content(),
    "annotation ids from 0": renamed(annotations=lambda n: n - 1),
    "negative annotation ids": renamed(annotations=lambda n: -n),
    "annotation ids as text": renamed(annotations=str),
    "annotation ids as floats": renamed(annotations=float),
    "huge annotation ids": renamed(annotations=lambda n: 10**30 + n),
    "image ids from 0": renamed(images=lambda n: n - 1),
    "negative image ids": renamed(images=lambda n: -n),
    "image ids as text": renamed(images=str),
    "image ids as UUIDs": renamed(images=lambda n: UUID[:-1] + str(n)),
    "image ids as floats": renamed(images=float),
    "huge image ids": renamed(images=lambda n: 2**63 + n),
    "ids of images as text and numbers": renamed(images=lambda n: str(n) if n > 1 else n),
    "category ids from 0": renamed(categories=lambda n: n - 1),
    "negative category ids": renamed(categories=lambda n: -n),
    "category ids as text": renamed(categories=str),
    "category ids as names": renamed(categories=lambda n: f"class {n}"),
    "category ids as floats": renamed(categories=float),
    "category ids with gaps": renamed(categories=lambda n: 1000 * n),
    "all ids as text": renamed(str, str, str),
    "unsorted lists": swapped(),
    "many categories": many_classes(),
    "parent of Roboflow": roboflow(),
    "crowds as text": all_annotations(iscrowd="0"),
    "crowds as booleans": all_annotations(iscrowd=False),
    "crowds as floats": all_annotations(iscrowd=0.0),
    "no crowds": all_annotations(iscrowd=...),
    "nothing ignored": all_annotations(ignore=0),
    "no areas": all_annotations(area=...),
    "odd areas": all_annotations(area="750"),
    "areas of null": all_annotations(area=None),
    "areas below zero": all_annotations(area=-1),
    "areas of NaN": all_annotations(area=float("nan")),
    "short polygons": all_annotations(segmentation=[[1, 2, 3, 4]]),
    "polygons as text": all_annotations(segmentation="none"),
    "broken masks": all_annotations(segmentation={"counts": [1, 2], "size": "x"}),
    "null polygons": all_annotations(segmentation=None),
    "one short polygon": edited("annotations", {"segmentation": [[1, 2]]}),
    "sizes as floats": edited_all("images", {"width": 96.0, "height": 80.0}),
    "unknown keys": {**edited_all("annotations", {"score": "x"}), "info": None, "licenses": 5},
    "class names of other scripts": edited("categories", {"name": "ねこ · кот/cat"}),
    "long class name": edited("categories", {"name": "c" * 2000}),
}


@pytest.fixture(params=["faster-coco-eval", "pycocotools"])
def _library(request, monkeypatch):
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_values_that_are_clear_are_read_and_evaluated(tmp_path, capsys, case):
    folder = write_coco(tmp_path / "cells", ACCEPTED[case])
    assert boxes_of(load(folder)) == 2 * COUNT
    assert check(folder, capsys)[0] == 0
    assert perfect_ap(folder) == pytest.approx(100)


def test_datasets_registered_by_detectron2_are_read_by_the_same_rules(tmp_path):
    content = all_annotations(segmentation=[[1, 2, 3, 4]])
    folder = write_coco(tmp_path / "cells", content)
    json_file = folder / "annotations/instances_train.json"
    register_coco_instances("plain", {}, str(json_file), str(folder / "images/train"))
    assert boxes_of(load_records("plain", for_training=True)) == 2 * COUNT
    json_file.write_bytes(every("annotations", bbox=5))
    with pytest.raises(DataError, match=r"annotations\[0\] has bbox 5"):
        load_records("plain", for_training=False)
    json_file.unlink()
    with pytest.raises(DataError, match="is not on this machine"):
        load_records("plain", for_training=False)


def test_check_with_masks_needs_polygons(tmp_path, capsys):
    folder = write_coco(tmp_path / "cells", edited("annotations", {"segmentation": [[1, 2]]}))
    words = ["--config-file", "coco/sparse_rcnn_R50_100pro_3x", "MODEL.MASK_ON", "True"]
    status, text = check(folder, capsys, *words)
    assert status == 1
    assert "train, annotation broken: 1.jpg: [10, 12, 30, 25] without usable segmentation" in text


def test_written_predictions_have_the_ids_of_the_file(tmp_path):
    folder = write_coco(tmp_path / "cells", renamed(images=lambda n: f"i{n}", categories=str))
    perfect_ap(folder, tmp_path)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {(d["image_id"], d["category_id"]) for d in written} == {
        (f"i{image}", label) for image in range(1, COUNT + 1) for label in "12"
    }


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read(tmp_path, capsys, encoding):
    content = json.dumps(coco_content()).encode(encoding)
    assert check(write_coco(tmp_path / "cells", content), capsys)[0] == 0


@pytest.mark.parametrize("name", ["sub\\1.jpg", "sub/1.jpg", "absolute", "sub/../sub/1.jpg"])
def test_file_names_with_folders_are_found(tmp_path, capsys, name):
    folder = tmp_path / "cells"
    path = folder / "images/train/sub/1.jpg" if name == "absolute" else name
    write_coco(folder, edited("images", {"file_name": str(path)}))
    for seed, split in enumerate(("train", "val")):
        write_images(folder / "images" / split / "sub", seed + 5)
    assert load(folder)[0]["file_name"].endswith("1.jpg")
    assert check(folder, capsys, "--splits", "train")[0] == 0


def test_some_crowds_and_ignored_objects_are_left_out_everywhere(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0]["ignore"] = True
    content["annotations"][3]["iscrowd"] = "1"
    folder = write_coco(tmp_path / "cells", content)
    assert boxes_of(load(folder)) == 2 * COUNT - 2
    status, text = check(folder, capsys)
    assert status == 0
    assert len([x for x in text.splitlines() if x.startswith("train, crowd")]) == 2
    assert perfect_ap(folder) == pytest.approx(100)


def test_objects_of_images_that_are_not_listed_are_left_out_with_a_warning(tmp_path, messages):
    folder = write_coco(tmp_path / "cells", edited("annotations", {"image_id": "1"}))
    assert boxes_of(load(folder)) == 2 * COUNT - 1
    (message,) = messages()
    assert "1 annotations are left out: annotation 1 belongs to image '1'" in message


@pytest.mark.parametrize("case", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_shared_cases_are_refused_or_work(tmp_path, capsys, case):
    folder = write_coco(tmp_path / "cells", case.read_bytes())
    images = json.loads(case.read_bytes())["images"]
    for seed, split in enumerate(("train", "val")):
        write_images(folder / "images" / split, seed, len(images))
        for number, image in enumerate(images, start=1):
            path = folder / "images" / split / f"{number}.jpg"
            path.rename(path.with_name("new-" + image["file_name"]))
        for path in (folder / "images" / split).glob("new-*"):
            path.rename(path.with_name(path.name[4:]))
    refused = ("bbox", "category_duplicate", "d06", "d14", "d16", "ignore_key", "size_zero")
    if case.stem.startswith(refused):
        with pytest.raises(DataError):
            load(folder)
        assert check(folder, capsys)[0] != 0
    else:
        assert boxes_of(load(folder)) == 12
        assert check(folder, capsys)[0] == 0
        assert perfect_ap(folder) == pytest.approx(100)


@pytest.mark.parametrize("case", ["all ids as text", "one short polygon", "annotation ids from 0"])
def test_odd_files_are_trained_on_and_evaluated(tmp_path, case):
    folder = write_coco(tmp_path / "cells", ACCEPTED[case])
    cfg = quick_cfg(tmp_path, "DATASETS.CUSTOM.FOLDER", str(folder), "SOLVER.MAX_ITER", 1)
    trainer = train(cfg)
    assert trainer.iter == 1
    assert "AP" in trainer._last_eval_results["bbox"]


@pytest.mark.parametrize("annotations", [..., []], ids=["no list", "empty list"])
def test_images_without_labels_are_predicted_and_metrics_left_out(tmp_path, annotations, capsys):
    folder = write_coco(tmp_path / "cells", coco_content())
    unlabeled = folder / "annotations/instances_val.json"
    unlabeled.write_bytes(dump(annotations=annotations))
    assert check(folder, capsys)[0] == 0
    options = ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "TEST.LOSS", True, "LOG.IMAGES", 1]
    trainer = train(quick_cfg(tmp_path, "DATASETS.CUSTOM.FOLDER", str(folder), *options))
    assert trainer._last_eval_results == {}
    written = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in written} == set(range(1, COUNT + 1))
