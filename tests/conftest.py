"""Shared fixtures: a tiny model, batches and datasets for it, a seed for every test."""

import os

# Waiting threads yield the core, so other processes slow the tests less.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# isort: split
import dsrcnn  # patches Detectron2 before anything else imports it

# isort: split
import json
import logging
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from dsrcnn.config import load_cfg, read_cfg
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import DsrcnnError

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.SparseRCNN.HIDDEN_DIM", 32, "MODEL.SparseRCNN.NHEADS", 4),
    *("MODEL.SparseRCNN.DIM_FEEDFORWARD", 64, "MODEL.SparseRCNN.DIM_DYNAMIC", 8),
    *("MODEL.SparseRCNN.NUM_PROPOSALS", 8, "MODEL.SparseRCNN.NUM_HEADS", 2),
    *("MODEL.SparseRCNN.NUM_CLASSES", 5, "DATALOADER.NUM_WORKERS", 0),
]

QUICK = ["--config-file", "quick/sparse_rcnn_shapes"]

# The same as words of a command line: two steps of two images of a quick config.
SMALL = [
    *map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0", "MODEL.BACKBONE.FREEZE_AT", "0",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _restore_loggers():
    """Remove the handlers that a run sets; they would keep messages from `caplog`."""
    loggers = [logging.getLogger(name) for name in ("dsrcnn", "detectron2", "fvcore")]
    before = [(x.handlers, x.propagate, x.level) for x in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _remove_new_datasets() -> Iterator[None]:
    before = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog.list()) - names:
            catalog.pop(name)


@pytest.fixture(autouse=True, scope="module")
def _clean_catalogs_of_the_module() -> Iterator[None]:
    """Remove the datasets that fixtures of a module register."""
    yield from _remove_new_datasets()


@pytest.fixture(autouse=True)
def _clean_catalogs(_clean_catalogs_of_the_module: None) -> Iterator[None]:
    """Remove the datasets that a test registers, whose names others would have to avoid."""
    yield from _remove_new_datasets()


def message_of(call: Callable[[], object]) -> str:
    """Return the message of an error of this package: one line that does not contain itself."""
    with pytest.raises(DsrcnnError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.count("Weights '") <= 1
    return text


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the message of ``dsrcnn WORDS``, which must end with status 2 and one error line."""
    from dsrcnn.cli.main import main

    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("error:") == 1, error
    assert error.count("\n") == 1, error
    return error


def tiny_cfg(*opts: object, config: str = "coco/sparse_rcnn_R50_100pro_3x") -> CfgNode:
    """Return the config of a Sparse R-CNN with 8 proposals, 2 stages and 32 channels."""
    return read_cfg(config, [*TINY, *opts])


def batch(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], classes: int = 5, seed: int = 0
) -> list[dict]:
    """Make random model inputs of the given (height, width) and numbers of ground truths."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for (height, width), count in zip(sizes, counts, strict=True):
        size = torch.tensor([width, height])
        corner = torch.rand(count, 2, generator=generator) * size * 0.6
        extent = torch.rand(count, 2, generator=generator) * size * 0.3 + 4
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(0, classes, (count,), generator=generator)
        shape = (3, height, width)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def quick_cfg(folder: Path, *opts: object) -> CfgNode:
    """Return the config of two steps on shapes with the tiny model, evaluated at the end."""
    return load_cfg("quick/sparse_rcnn_shapes", [*SMALL, "OUTPUT_DIR", str(folder), *opts])


def train(cfg: CfgNode, *, resume: bool = False) -> Trainer:
    """Train to the end."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def write_clip(
    path: Path, frames: Sequence[np.ndarray], *, fps: float = 10, codec: str = "mp4v"
) -> str:
    """Write a video of frames (H, W, 3) BGR and return its path."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return str(path)


def gray_frames(values: Iterable[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Return plain frames of the gray values."""
    return [np.full((height, width, 3), value, np.uint8) for value in values]


def write_coco(
    annotations: Path,
    images: Path,
    count: int = 2,
    seed: int = 0,
    classes: Sequence[str] = ("left", "right"),
) -> None:
    """Write a COCO dataset: images of 96 x 64 pixels, an object of the first two classes each."""
    for folder in (annotations.parent, images):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records, boxes = [], []
    for index in range(1, count + 1):
        name = f"{index}.jpg"
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(images / name)
        records.append({"id": index, "file_name": name, "height": 64, "width": 96})
        for label, box in ((1, [5, 5, 30, 30]), (2, [50, 20, 40, 30])):
            entry = {"id": len(boxes) + 1, "image_id": index, "category_id": label, "bbox": box}
            boxes.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"images": records, "annotations": boxes, "categories": categories}
    annotations.write_text(json.dumps(content))


def coco_options(folder: Path, count: int = 4) -> list[str]:
    """Write a COCO dataset into `folder` and return the options to train and test on it."""
    annotations, images = folder / "annotations.json", folder / "images"
    write_coco(annotations, images, count)
    return [
        *("DATASETS.CUSTOM.NAME", folder.name, "DATASETS.CUSTOM.TRAIN_JSON", str(annotations)),
        *("DATASETS.CUSTOM.TRAIN_IMAGES", str(images), "DATASETS.CUSTOM.TEST_JSON"),
        *(str(annotations), "DATASETS.CUSTOM.TEST_IMAGES", str(images)),
    ]


def write_voc(folder: Path, objects: dict[str, list[tuple]], splits: dict[str, list[str]]) -> None:
    """Write a Pascal VOC dataset: (class, xmin, ymin, xmax, ymax) by image, images by split."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image, entries in objects.items():
        pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"JPEGImages/{image}.jpg")
        text = "<size><width>96</width><height>64</height><depth>3</depth></size>"
        for label, *box in entries:
            edges = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            bounds = "".join(f"<{key}>{value}</{key}>" for key, value in edges)
            state = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
            text += f"<object><name>{label}</name>{state}<bndbox>{bounds}</bndbox></object>"
        (folder / f"Annotations/{image}.xml").write_text(f"<annotation>{text}</annotation>")
    for split, images in splits.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(images))


def triangle() -> tuple[np.ndarray, list[float]]:
    """Draw a random white triangle on black; returns the image and the box of its pixels."""
    image = np.zeros((90, 120, 3), np.uint8)
    cv2.fillPoly(image, [np.random.randint([20, 20], [100, 70], (3, 2))], (255,) * 3)
    ys, xs = np.nonzero(image[..., 0])
    return image, [*map(float, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))]


def smooth_image(height: int = 60, width: int = 80) -> np.ndarray:
    """Return an image without edges, which JPEG and interpolation methods change little."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 200 / width, y * 200 / height, (x + y) * 200 / (width + height)]
    return np.stack(channels, axis=2).astype(np.uint8)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_program(*command: object, status: int = 0, **options: object) -> str:
    """Run a command in the repository and return what it prints to stdout and stderr."""
    words, streams = [*map(str, command)], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options = {"cwd": REPOSITORY, "env": ENVIRONMENT, "text": True, "timeout": 240, **options}
    done = subprocess.run(words, **streams, **options, check=False)
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a text file and returns its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def messages(caplog):
    """Return a function that lists the messages of this package's loggers."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("dsrcnn")]


@pytest.fixture
def write_image(tmp_path):
    """Return a function that writes pixels (H, W, 3) or a Pillow image and returns the path."""

    def write(pixels, name="image.png", **options):
        path = tmp_path / name
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(path, **options)
        return str(path)

    return write


ANIMALS = ["cat", "dog", "bird", "fish", "bee"]
LIVELY = 3.0  # makes scores of random weights differ


def save_model(path, *opts):
    """Write a weight file as training does; returns its config."""
    torch.manual_seed(0)
    opts = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, *opts)
    cfg = tiny_cfg(*opts)
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_logits" in name:
                parameter.mul_(LIVELY)
            if "bboxes_delta.weight" in name:
                parameter.mul_(0.1)
    content = {"model": model.state_dict(), "config": cfg.dump(), "classes": ANIMALS}
    torch.save(content, path)
    return cfg


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A weight file with config and class names."""
    path = tmp_path_factory.mktemp("model") / "model_final.pth"
    save_model(path)
    return path


@pytest.fixture(scope="session")
def detector(model_file):
    """The detector of the weight file."""
    return dsrcnn.load(model_file, device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with images of three shapes, and one below it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    names = ("a.png", "b.jpg", "c.png", "d.PNG", "more/e.png")
    shapes = ((96, 64), (64, 96), (96, 64), (100, 70), (96, 64))
    generator = torch.Generator().manual_seed(0)
    for name, (width, height) in zip(names, shapes, strict=True):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder
