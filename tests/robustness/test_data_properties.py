"""Mutated COCO, YOLO and VOC files are read sensibly or refused in one line, never otherwise."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import quick_cfg
from data_cases import (
    COUNT,
    boxes_of,
    check,
    coco_content,
    load,
    perfect_ap,
    write_coco,
    write_voc,
    write_yolo,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsrcnn.data.build import training_records
from dsrcnn.errors import DataError


def examples(count):
    fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=fixtures
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A valid folder of each layout."""
    root = tmp_path_factory.mktemp("valid")
    write_coco(root / "coco", coco_content())
    write_yolo(root / "yolo")
    write_voc(root / "voc")
    return root


@contextmanager
def copied(folder: Path):
    """A copy of a folder, with links to its images, until the end of the block."""
    images = ("images", "JPEGImages")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        shutil.copytree(
            folder, copy, ignore=lambda path, names: images if path == str(folder) else ()
        )
        for name in images:
            if (folder / name).exists():
                (copy / name).symlink_to(folder / name)
        yield copy


def outcome(read, folder):
    """The number of boxes to learn, at least one, or -1 after a refusal in one line."""
    message, records = "", []
    try:
        records = read(folder)
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 3000
    if message:
        return -1
    assert 1 <= len(records) <= 2 * COUNT
    assert boxes_of(records) >= 1
    return boxes_of(records)


def train_on(folder):
    return training_records(quick_cfg(folder, "DATASETS.CUSTOM.FOLDER", str(folder)))


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 4), st.integers(), st.floats(width=32),
    st.sampled_from(["", "1", "0", "\0", "1.jpg", "a\\1.jpg", "left", -0.0, 1e308, 10**400]),
    st.text(max_size=4), st.lists(st.floats(-1e9, 1e9), max_size=5),
    st.lists(st.one_of(st.integers(-100, 100), st.text(max_size=2), st.none()), max_size=4),
    st.dictionaries(st.sampled_from(["id", "bbox", "counts", "size"]), st.integers(), max_size=2),
)  # fmt: skip
KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "area",
                    "segmentation"),
    "categories": ("id", "name", "supercategory"),
}  # fmt: skip


@st.composite
def mutations(draw):
    """A part, an entry and a key, or `None` for the whole of it, with an odd value or no value."""
    part = draw(st.sampled_from(sorted(KEYS)))
    entry = draw(st.one_of(st.none(), st.integers(0, 1)))
    key = draw(st.one_of(st.just(None), *(st.sampled_from(KEYS[part]),) * 6))
    return part, entry, key, draw(st.one_of(st.just(...), *(ODD,) * 5))


def mutate(content, part, entry, key, value):
    """Change a value of an entry, or of all entries; replace an entry or a list without a key."""
    entries = content.get(part)
    if not isinstance(entries, list):
        return
    if key is None and entry is None:
        content[part] = value
    elif key is None:
        entries[entry : entry + 1] = [] if value is ... else [value]
    for item in entries if entry is None else entries[entry : entry + 1]:
        if key is not None and isinstance(item, dict):
            item[key] = value
            if value is ...:
                del item[key]
    if content[part] is ...:
        del content[part]


@examples(200)
@given(changes=st.lists(mutations(), min_size=1, max_size=2))
def test_mutated_values_of_coco(folders, capsys, changes):
    content = coco_content()
    for change in changes:
        mutate(content, *change)
    with copied(folders / "coco") as folder:
        for split in ("train", "val"):
            path = folder / f"annotations/instances_{split}.json"
            path.write_text(json.dumps(content))
        boxes = outcome(load, folder)
        status, _ = check(folder, capsys)
        assert status != 0 or boxes > 0
        if boxes > 0:
            ap = perfect_ap(folder)
            assert ap == pytest.approx(100) or any(key == "bbox" for _, _, key, _ in changes)


def edits(size):
    """Places in a text with what to put there, as fractions of its length."""
    place = st.floats(0, 1, exclude_max=True)
    piece = st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b"", b"-", b"0", b"9", b"nan", b"1e999", b"\0", b"\n", b" ", b"[", b"}",
                         b"<", b">", b"&", b'"', b"'", b":", b"null", b"\xff", b"{", b"#", b"../"]),
    )  # fmt: skip
    return st.lists(st.tuples(place, st.integers(0, 3), piece), min_size=1, max_size=size)


def edit(path: Path, changes):
    content = path.read_bytes()
    for place, length, piece in changes:
        start = int(place * len(content))
        content = content[:start] + piece + content[start + length :]
    path.write_bytes(content)


@examples(100)
@given(changes=edits(3))
def test_edited_text_of_coco(folders, capsys, changes):
    with copied(folders / "coco") as folder:
        edit(folder / "annotations/instances_train.json", changes)
        boxes = outcome(load, folder)
        assert check(folder, capsys, "--splits", "train")[0] != 0 or boxes > 0


@examples(100)
@given(file=st.sampled_from(["data.yaml", "labels/train/1.txt"]), changes=edits(3))
def test_edited_text_of_yolo(folders, capsys, file, changes):
    with copied(folders / "yolo") as folder:
        edit(folder / file, changes)
        boxes = outcome(train_on, folder)
        assert "Ready to train." not in check(folder, capsys)[1] or boxes > 0


@examples(100)
@given(file=st.sampled_from(["Annotations/1.xml", "ImageSets/Main/train.txt"]), changes=edits(3))
def test_edited_text_of_voc(folders, capsys, file, changes):
    with copied(folders / "voc") as folder:
        edit(folder / file, changes)
        boxes = outcome(train_on, folder)
        assert "Ready to train." not in check(folder, capsys)[1] or boxes > 0


def test_valid_folders_are_read(folders, capsys):
    for name, read in (("coco", load), ("yolo", train_on), ("voc", train_on)):
        with copied(folders / name) as folder:
            assert outcome(read, folder) >= 4
            assert check(folder, capsys)[0] == 0
