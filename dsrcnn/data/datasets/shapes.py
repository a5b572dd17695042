"""``shapes_train`` and ``shapes_val``: a synthetic dataset, drawn when it is read.

Five classes of filled shapes, from small to large, rotated and overlapping, on a noisy background,
in images of several sizes. An image is a function of its name, the same in every process, and its
name works wherever Detectron2 opens a file.
"""

import colorsys
import io
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

CLASSES = ["circle", "square", "triangle", "star", "cross"]
SPLITS = {"train": 2000, "val": 200}  # number of images
_SCHEME = "shapes://"
_SEED = 20220502
_SIDES = (96, 112, 128)  # height and width of an image, drawn independently
_OBJECTS = (1, 5)
_EXTENT = (0.18, 0.65)  # diameter of a shape as a fraction of the shorter side
_HUE_SPREAD = 0.05  # of a full circle; neighboring classes are 0.2 apart
_MAX_OVERLAP = 0.35  # of the smaller of two boxes


class Shape(NamedTuple):
    """One object: its class, outline (N, 2) in pixels and BGR color."""

    label: int
    outline: np.ndarray
    color: tuple[int, int, int]

    @property
    def box(self) -> np.ndarray:
        """Bounding box (4,), xyxy in pixels, including the last covered pixel."""
        return np.concatenate([self.outline.min(axis=0), self.outline.max(axis=0) + 1])


class Scene(NamedTuple):
    """Contents of an image; shapes from back to front."""

    height: int
    width: int
    shapes: list[Shape]
    generator: np.random.Generator


def register_shapes() -> None:
    """Register both splits and the handler of their file names; may be called again."""
    PathManager.register_handler(_ShapesHandler(), allow_override=True)
    for split in SPLITS:
        name = f"shapes_{split}"
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, partial(shapes_records, split))
            MetadataCatalog.get(name).set(thing_classes=list(CLASSES), evaluator_type="coco")


class _ShapesHandler(PathHandler):
    """Opens ``shapes://train/17.bmp`` as a file; uncompressed, since it is read only once."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_SCHEME]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> io.BytesIO:
        split, name = path.removeprefix(_SCHEME).split("/")
        image = draw_scene(split, int(name.removesuffix(".bmp")))
        return io.BytesIO(cv2.imencode(".bmp", image)[1].tobytes())


def shapes_records(split: str) -> list[dict]:
    """Return the records of a split in Detectron2's format; images are drawn when opened."""
    records: list[dict[str, Any]] = []
    for index in range(SPLITS[split]):
        scene = _make_scene(split, index)
        annotations = []
        for shape in scene.shapes:
            box = {"bbox": [float(v) for v in shape.box], "bbox_mode": BoxMode.XYXY_ABS}
            annotations.append({**box, "category_id": shape.label, "iscrowd": 0})
        record = {"file_name": f"{_SCHEME}{split}/{index}.bmp", "image_id": index}
        record |= {"height": scene.height, "width": scene.width, "annotations": annotations}
        records.append(record)
    return records


def draw_scene(split: str, index: int) -> np.ndarray:
    """Draw the image of a record, (H, W, 3) uint8 BGR."""
    height, width, shapes, generator = _make_scene(split, index)
    coarse = generator.integers(60, 200, (4, 4, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    for shape in shapes:
        cv2.fillPoly(image, [shape.outline], shape.color)
        edge = 0 if sum(shape.color) > 380 else 255  # visible on any background
        cv2.polylines(image, [shape.outline], True, (edge,) * 3, 1)
    return image


def _make_scene(split: str, index: int) -> Scene:
    generator = np.random.default_rng([_SEED, sorted(SPLITS).index(split), index])
    height, width = (int(generator.choice(_SIDES)) for _ in range(2))
    shapes: list[Shape] = []
    for _ in range(int(generator.integers(*_OBJECTS, endpoint=True))):
        label = int(generator.integers(len(CLASSES)))
        low, high = np.log(_EXTENT)
        extent = float(np.exp(generator.uniform(low, high))) * min(height, width)
        angle = generator.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        center = generator.uniform(extent / 2 + 1, np.array([width, height]) - extent / 2 - 2)
        outline = np.rint(_unit_outline(label) @ rotation.T * extent + center).astype(np.int32)
        shape = Shape(label, outline, _pick_color(label, generator))
        if all(_overlap(shape.box, other.box) <= _MAX_OVERLAP for other in shapes):
            shapes.append(shape)
    return Scene(height, width, shapes, generator)


def _unit_outline(label: int) -> np.ndarray:
    """Return the outline (N, 2) of a class with diameter 1, centered at the origin."""
    name = CLASSES[label]
    if name == "cross":
        arm = 0.17
        half = (0.25 - arm**2) ** 0.5  # the corners lie on the circle of diameter 1
        corner = [(arm, half), (arm, arm), (half, arm)]
        turns = [((c, -s), (s, c)) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.array([np.array(turn) @ point for turn in turns for point in corner[::-1]])
    count = {"circle": 40, "square": 4, "triangle": 3, "star": 10}[name]
    inner = 0.42 if name == "star" else 1.0
    angle = np.arange(count) * 2 * np.pi / count
    radius = np.where(np.arange(count) % 2, inner, 1.0) * 0.5
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _pick_color(label: int, generator: np.random.Generator) -> tuple[int, int, int]:
    """Draw a BGR color; hues of classes overlap, so that color alone does not tell them apart."""
    hue = (label / len(CLASSES) + generator.normal(0, _HUE_SPREAD)) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, *generator.uniform(0.5, 1.0, 2))
    return int(255 * blue), int(255 * green), int(255 * red)


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over the smaller area."""
    low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
    areas = [float(np.prod(b[2:] - b[:2])) for b in (box, other)]
    return float(np.prod(np.clip(high - low, 0, None))) / min(areas)
