"""Odd images and odd records of users' functions: the same pixels everywhere, or one error."""

import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, quick_cfg, tiny_cfg, train
from data_cases import check, coco_content, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from dsrcnn.data import DetectionMapper, build_test_loader, build_train_loader
from dsrcnn.data.build import build_validation_loader, training_records
from dsrcnn.data.images import allow_large_images, image_file_size, read_image
from dsrcnn.data.samplers import Draw
from dsrcnn.errors import DataError
from dsrcnn.evaluation import build_evaluator

GRAY16 = np.linspace(0, 65535, 96 * 80).reshape(80, 96).astype(np.uint16)
GRAY8 = (GRAY16 >> 8).astype(np.uint8)
RGB = np.stack([GRAY8, GRAY8[::-1], GRAY8[:, ::-1]], axis=2)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette():
    image = Image.fromarray(RGB).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def gray(pixels):
    return np.stack([pixels] * 3, axis=2)


def wide_pgm(path):
    header = f"P5 {GRAY16.shape[1]} {GRAY16.shape[0]} 65535\n".encode()
    path.write_bytes(header + GRAY16.astype(">u2").tobytes())


# File name, image, options of Pillow and the pixels expected; None for the file's own, by Pillow.
IMAGES = {
    "16-bit gray png": ("a.png", Image.fromarray(GRAY16), {}, gray(GRAY8)),
    "16-bit gray tiff": ("a.tif", Image.fromarray(GRAY16), {}, gray(GRAY8)),
    "16-bit gray, rotated": ("a.png", Image.fromarray(GRAY16), {"exif": exif(6)},
                             gray(np.rot90(GRAY8, -1))),
    "16-bit pgm": ("a.pgm", wide_pgm, {}, gray(GRAY8)),
    "palette": ("a.png", palette()[0], {}, palette()[1]),
    "palette with transparency": ("a.png", palette()[0], {"transparency": 0}, palette()[1]),
    "alpha": ("a.png", Image.fromarray(np.dstack([RGB, GRAY8])), {}, RGB),
    "gray and alpha": ("a.png", Image.fromarray(np.dstack([GRAY8, GRAY8]), "LA"), {}, gray(GRAY8)),
    "bits": ("a.png", Image.fromarray(GRAY8 > 90), {}, gray((GRAY8 > 90) * np.uint8(255))),
    "rotated png": ("a.png", Image.fromarray(RGB), {"exif": exif(8)}, np.rot90(RGB)),
    "rotated jpeg": ("a.jpg", Image.fromarray(RGB), {"exif": exif(6), "quality": 95}, None),
    "unknown orientation": ("a.jpg", Image.fromarray(RGB), {"exif": exif(9)}, None),
    "broken EXIF": ("a.jpg", Image.fromarray(RGB), {"exif": b"Exif\0\0II*\0\xff\xff"}, None),
    "CMYK": ("a.jpg", Image.fromarray(RGB).convert("CMYK"), {}, None),
    "YCbCr tiff": ("a.tif", Image.fromarray(RGB).convert("YCbCr"), {}, None),
    "gif": ("a.gif", palette()[0], {}, palette()[1]),
    "webp": ("a.webp", Image.fromarray(RGB), {"lossless": True}, RGB),
}  # fmt: skip


def save(folder, name, image, options):
    if callable(image):
        image(folder / name)
    else:
        image.save(folder / name, **options)
    return folder / name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", IMAGES)
def test_odd_images_have_the_same_pixels_everywhere(tmp_path, case):
    name, image, options, expected = IMAGES[case]
    path = save(tmp_path, name, image, options)
    if case == "YCbCr tiff":
        try:
            Image.open(path).load()
        except OSError:
            pytest.skip("this Pillow (12.3) cannot read the file that it writes")
    for order in ("RGB", "BGR"):
        pixels = read_image({"file_name": str(path)}, order)
        assert pixels.dtype == np.uint8
        if expected is not None:
            np.testing.assert_array_equal(pixels, expected[..., :: 1 if order == "RGB" else -1])
        fast = read_image({"file_name": str(path)}, order, use_opencv=True)
        assert np.abs(fast.astype(int) - pixels).max() <= 2
    assert image_file_size(path, decode=True) == image_file_size(path) == pixels.shape[1::-1]
    # What users of `DefaultPredictor` read.
    if case not in ("CMYK", "palette with transparency", "rotated png", "16-bit gray, rotated"):
        theirs = cv2.imread(str(path))
        if theirs is not None:
            assert np.abs(theirs.astype(int) - pixels).max() <= 2


def test_shared_gray_image_is_scaled_to_8_bits():
    path = REPOSITORY.parent / "shared/cases/gray16.png"
    if not path.is_file():
        pytest.skip("the cases are not on this machine")
    pixels = read_image({"file_name": str(path)}, "BGR")
    np.testing.assert_array_equal(pixels, cv2.imread(str(path)))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content))


def jpeg(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "whole.jpg")
    return (tmp_path / "whole.jpg").read_bytes()


def png(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


BROKEN = {
    "empty": (".jpg", lambda _: b""),
    "text": (".jpg", lambda _: b"no image"),
    "page": (".jpg", lambda _: b"<html><body>404</body></html>"),
    "header only": (".jpg", lambda p: jpeg(p)[:100]),
    "cut": (".jpg", lambda p: jpeg(p)[:-200]),
    "cut png": (".png", lambda p: png(p)[:-100]),
    "signature only": (".png", lambda p: png(p)[:8]),
    "odd png": (".png", lambda p: png(p)[:8] + chunk(b"IHDR", b"\0" * 13)),
    "flipped bytes": (".png", lambda p: png(p)[:80] + b"\xff" * 40 + png(p)[120:]),
    "bomb": (".png", lambda p: png(p)[:8] + chunk(b"IHDR", struct.pack(">II", 60000, 60000)
                                                + b"\x08\x02\0\0\0")),
    "zeros": (".tif", lambda _: b"II*\0" + b"\0" * 100),
    "icon": (".ico", lambda _: b"\0\0\1\0\1\0" + b"\xff" * 20),
    "float tiff": (".tif", lambda p: tiff(p, np.float32)),
    "32-bit tiff": (".tif", lambda p: tiff(p, np.int32)),
}  # fmt: skip


def tiff(tmp_path, kind):
    Image.fromarray(GRAY8.astype(kind)).save(tmp_path / "wide.tif")
    return (tmp_path / "wide.tif").read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_named_in_one_line(tmp_path, capsys, case):
    suffix, content = BROKEN[case]
    name = f"images/train/1{suffix}"
    data = content(tmp_path)
    content = coco_content()
    content["images"][0]["file_name"] = Path(name).name
    folder = write_coco(tmp_path / "cells", content)
    (folder / name).write_bytes(data)
    for use_opencv in (False, True):
        with pytest.raises(DataError, match=r"Image .*1\.\w+ cannot be read") as caught:
            read_image({"file_name": str(folder / name)}, "RGB", use_opencv)
        assert "\n" not in str(caught.value)
    status, text = check(folder, capsys, "--splits", "train", "--output", str(tmp_path / "x.png"))
    assert status == 1
    assert "train, image broken: " in text


AUGMENTED = {
    "plain": [],
    "OpenCV": ["INPUT.OPENCV", True],
    "crops": ["INPUT.CROP.ENABLED", True],
    "relative crops": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative",
                       "INPUT.CROP.SIZE", "[0.3, 0.3]"],
    "ranges of crops": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range",
                        "INPUT.CROP.SIZE", "[0.1, 0.1]", "INPUT.OPENCV", True],
    "jitter": ["INPUT.AUG.SCALE_JITTER.SIZE", 64],
    "all": ["INPUT.AUG.HSV.PROB", 1.0, "INPUT.AUG.BLUR.PROB", 1.0, "INPUT.AUG.NOISE.PROB", 1.0,
            "INPUT.AUG.WARP.PROB", 1.0, "INPUT.AUG.MOSAIC.PROB", 0.5,
            "INPUT.AUG.COPY_PASTE.PROB", 0.5, "INPUT.AUG.MIXUP.PROB", 0.5],
}  # fmt: skip


@pytest.mark.parametrize("case", AUGMENTED)
def test_narrow_images_are_augmented_and_tested(tmp_path, case):
    sizes = ((1, 400), (400, 1), (2, 600), (5, 1000), (1, 1))
    for number, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / f"{number}.png")
    register(tmp_path, [
        {**record(tmp_path, number), "height": h, "width": w,
         "annotations": [annotation(bbox=[0, 0, w, h])]}
        for number, (h, w) in enumerate(sizes)
    ])  # fmt: skip
    options = ["INPUT.MAX_SIZE_TRAIN", 120, "INPUT.MAX_SIZE_TEST", 120, *AUGMENTED[case]]
    cfg = cfg_of(*options)
    dataset = build_train_loader(cfg).dataset
    for index in range(len(sizes)):
        for seed in range(3):
            assert min(dataset[Draw(index, seed)]["image"].shape) >= 1
    assert [min(batch[0]["image"].shape) >= 1 for batch in build_test_loader(cfg, "theirs")]


def test_narrow_images_are_trained_on_and_evaluated(tmp_path):
    for number, size in enumerate(((400, 2), (2, 400))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / f"{number}.png")
    sizes = [{"height": 2, "width": 400}, {"height": 400, "width": 2}]
    whole = [[0, 0, 400, 2], [0, 0, 2, 400]]
    register(tmp_path, [
        {**record(tmp_path, number), **sizes[number],
         "annotations": [annotation(bbox=whole[number])]}
        for number in range(2)
    ])  # fmt: skip
    cfg = cfg_of("SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "bbox" in train(cfg)._last_eval_results


def annotation(**changes):
    values = {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    return {k: v for k, v in {**values, **changes}.items() if v is not ...}


def record(folder, number=0, **changes):
    path = folder / f"{number}.png"
    if not path.exists():
        Image.fromarray(RGB).save(path)
    values = {"file_name": str(path), "image_id": number, "height": 80, "width": 96}
    values["annotations"] = [annotation()]
    return {k: v for k, v in {**values, **changes}.items() if v is not ...}


def register(folder, records, classes=("left", "right")):
    load = records if callable(records) else lambda: records
    DatasetCatalog.register("theirs", load)
    if classes is not None:
        MetadataCatalog.get("theirs").thing_classes = classes


def cfg_of(*opts):
    sizes = [
        "INPUT.MIN_SIZE_TRAIN",
        "(32,)",
        "INPUT.MIN_SIZE_TEST",
        32,
        "INPUT.CROP.ENABLED",
        False,
    ]
    small = ["SOLVER.IMS_PER_BATCH", 2, "MODEL.BACKBONE.FREEZE_AT", 0]
    cfg = tiny_cfg("MODEL.SparseRCNN.NUM_CLASSES", 2, *sizes, *small, *opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("theirs",), ("theirs",)
    return cfg


def raising():
    raise KeyError("size")


WHOLE = [  # what the function returns
    (lambda _: None, "returns NoneType None"), (lambda _: "records", "returns str 'records'"),
    (lambda _: {"a": 1}, "returns dict"), (lambda _: iter([]), "returns list_iterator"),
    (lambda _: 5, "returns int 5"), (lambda _: [], "is empty"), (lambda _: (), "is empty"),
    (lambda _: [5], "record 0 is int 5; expected a dictionary"),
    (lambda _: [None], "record 0 is NoneType"), (lambda _: raising(), "raises KeyError: 'size' "),
    (lambda _: 1 / 0, "raises ZeroDivisionError: division by zero "),
    (lambda _: Path("/nowhere/boxes.json").read_text(), "/nowhere/boxes.json does not exist"),
    (lambda _: __import__("absent_package"), "needs the package absent_package"),
    (lambda _: [{}], "record 0 lacks file_name"),
]  # fmt: skip
RECORDS = [  # a value of a record; ... leaves it out
    *(({"file_name": v}, "record 0 lacks file_name") for v in (..., None, "")),
    *(({"file_name": v}, "record 0 has file_name .*expected a path") for v in (5, ["a.png"], b"x")),
    ({"file_name": "/nowhere/a.png"}, "1 of 1 images of Dataset 'theirs' do not exist"),
    ({"height": ...}, "record 0 lacks height"), ({"width": ...}, "record 0 lacks width"),
    *(({"height": v}, "record 0 has height .*expected pixels")
      for v in ("80", 0, -80, None, 80.5, True, np.inf, [80])),
    *(({"annotations": v}, "record 0 lacks annotations") for v in (..., None)),
    *(({"annotations": v}, "record 0 has annotations .*expected a list")
      for v in ({"bbox": 1}, 5, annotation())),
    ({"annotations": ["box"]}, "annotation 0 is str 'box'; expected a dictionary"),
    ({"annotations": []}, "no box that can be used"),
    ({"annotations": [annotation(iscrowd=1)]}, r"no box that can be used \(1 are crowds"),
    ({"annotations": [annotation(bbox=[1, 2, 0, 0])]}, "no box that can be used"),
    ({"annotations": [annotation(bbox=[np.nan] * 4)]}, "no box that can be used"),
]  # fmt: skip
ANNOTATIONS = [
    *(({key: v}, f"annotation 0 lacks {key}")
      for key in ("bbox", "bbox_mode", "category_id") for v in (..., None)),
    *(({"bbox": v}, "annotation 0 has bbox .*expected four numbers")
      for v in (5, "1234", [1, 2, 3], [1, 2, "3", 4], [1, 2, None, 4], [], list("1234"))),
    *(({"bbox_mode": v}, "annotation 0 has bbox_mode .*expected BoxMode.XYXY_ABS or")
      for v in ("XYXY_ABS", 7, BoxMode.XYXY_REL, BoxMode.XYWHA_ABS)),
    *(({"category_id": v}, "annotation 0 has category_id .*expected an integer from 0 to 1")
      for v in (2, -1, "0", "left", 0.5, 1.0, True, [0], np.nan)),
    *(({"iscrowd": v}, "annotation 0 has iscrowd .*expected 0 or 1")
      for v in ("0", None, -1, 2, [], "no")),
]  # fmt: skip


def refused(phrase):
    with pytest.raises(DataError, match=phrase) as caught:
        training_records(cfg_of())
    assert "\n" not in str(caught.value)
    assert "theirs" in str(caught.value)


@pytest.mark.parametrize(("function", "phrase"), WHOLE)
def test_odd_result_of_a_function_is_refused(tmp_path, function, phrase):
    register(tmp_path, lambda: function(tmp_path))
    refused(phrase)
    with pytest.raises(DataError):
        build_test_loader(cfg_of(), "theirs")


@pytest.mark.parametrize(("changes", "phrase"), RECORDS)
def test_odd_record_is_refused(tmp_path, changes, phrase):
    register(tmp_path, [record(tmp_path, **changes)])
    refused(phrase)


@pytest.mark.parametrize(("changes", "phrase"), ANNOTATIONS)
def test_odd_annotation_is_refused(tmp_path, changes, phrase):
    register(tmp_path, [record(tmp_path, annotations=[annotation(**changes)])])
    refused(phrase)
    with pytest.raises(DataError, match=phrase):
        build_evaluator(cfg_of(), "theirs")


@pytest.mark.parametrize(("ids", "phrase"), [
    ([..., 1], "record 0 lacks image_id"), ([None, 1], "record 0 lacks image_id"),
    ([1, 1], "records 0 and 1 have the image_id 1"), ([True, 2], "record 0 has image_id True"),
    ([[1], 2], r"record 0 has image_id \[1\]"), ([1.5, 2], "record 0 has image_id 1.5"),
])  # fmt: skip
def test_odd_image_ids_are_refused_in_evaluation(tmp_path, ids, phrase):
    register(tmp_path, [record(tmp_path, n, image_id=i) for n, i in enumerate(ids)])
    assert len(training_records(cfg_of())) == 2
    for build in (build_evaluator, build_test_loader):
        with pytest.raises(DataError, match=phrase):
            build(cfg_of(), "theirs")


@pytest.mark.parametrize("classes", ["left", 5, ["a", "a"], ["a", 5], [None]])
def test_odd_class_names_are_refused(tmp_path, classes):
    register(tmp_path, [record(tmp_path)], classes)
    refused("thing_classes|class name")


def test_unknown_class_names_are_refused_in_evaluation(tmp_path):
    register(tmp_path, [record(tmp_path)], None)
    assert len(training_records(cfg_of())) == 1
    with pytest.raises(DataError, match="has no class names"):
        build_evaluator(cfg_of(), "theirs")


def test_records_of_numpy_paths_and_tuples_are_trained_on_and_evaluated(tmp_path):
    box = np.array([1, 2, 30, 40], np.float32)
    odd = annotation(bbox=box, category_id=np.int64(1), iscrowd=False, bbox_mode=1)
    sizes = {"height": np.int64(80), "width": np.int64(96), "image_id": np.int32(7)}
    records = [record(tmp_path, annotations=(odd,), **sizes)]
    records += [record(tmp_path, 1, height=..., width=..., file_name=tmp_path / "1.png")]
    register(tmp_path, tuple(records), ("left", "right"))
    cfg = cfg_of("SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "bbox" in train(cfg)._last_eval_results


def test_records_without_labels_are_predicted(tmp_path, messages):
    register(tmp_path, [record(tmp_path, number, annotations=...) for number in range(2)])
    cfg = cfg_of("OUTPUT_DIR", str(tmp_path))
    (sample,) = next(iter(build_test_loader(cfg, "theirs")))
    assert isinstance(sample["image"], torch.Tensor)
    assert build_validation_loader(cfg, "theirs") == []
    assert build_evaluator(cfg, "theirs").evaluate() == {}
    assert "metrics are left out; the predictions are in" in messages()[-1]


def test_record_without_annotations_is_mapped(tmp_path):
    mapper = DetectionMapper(cfg_of(), is_train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mapper(record(tmp_path, annotations=...))["image"].dtype == torch.uint8
    assert quick_cfg(tmp_path).MODEL.SparseRCNN.NUM_CLASSES == 5


def test_an_image_above_the_limit_is_refused_until_tiles_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # refuses more than twice as many
    path = tmp_path / "large.png"
    Image.new("RGB", (40, 30), (1, 2, 3)).save(path)
    with pytest.raises(DataError, match=r"large.png has more than 0 million pixels.*in tiles"):
        read_image({"file_name": str(path)}, "RGB")
    allow_large_images()
    assert Image.MAX_IMAGE_PIXELS == 2**29
    assert read_image({"file_name": str(path)}, "RGB").shape == (30, 40, 3)
