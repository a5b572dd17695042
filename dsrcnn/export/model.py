"""Export of a trained model to a file that needs none of its code."""

import copy
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from torch import nn

from ..engine.weight_io import write_atomically
from ..errors import ConfigError, DsrcnnError, ExportError, plain_system_errors
from ..modeling.meta_arch.sparse_rcnn import SparseRCNN
from ..utils.files import prepare_folder
from ..utils.precision import exact_float32
from ..version import __version__
from .formats import FORMATS, LARGEST, Format, Session, has_deformable
from .info import ModelInfo
from .parity import FLOAT16, FLOAT32, Detections, Parity, compare
from .program import DetectionProgram, Program
from .resize import check_resizing
from .two_stage import TwoStageProgram

_LOGGER = logging.getLogger(__name__)
_REPEATS = 5  # of timings; their median counts


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export.

    Attributes:
        format: a name in `FORMATS`.
        size: height and width in pixels that images are resized to fit.
        dynamic_batch: accept any number of images of one size, not one.
        nms: False to leave out NMS, True to demand it; None for the config's choice.
        half: float16 for convolutions, linear layers and their weights.
    """

    format: str
    size: tuple[int, int]
    dynamic_batch: bool = False
    nms: bool | None = None
    half: bool = False


@dataclass(frozen=True)
class Export:
    """An exported file that was compared with the model.

    Attributes:
        path: of the file.
        info: its metadata.
        images: what it was compared on, in words.
        parity: largest differences from the model.
        seconds: median time of the file for an image.
        model_seconds: of the model, in the same run.
    """

    path: Path
    info: ModelInfo
    images: str
    parity: Parity
    seconds: float
    model_seconds: float


def export_model(
    model: nn.Module,
    cfg: CfgNode,
    classes: Sequence[str],
    path: str | os.PathLike[str],
    options: ExportOptions,
    images: Sequence[np.ndarray],
    images_name: str = "",
) -> Export:
    """Export a model, run the file, and compare its detections with the model's.

    Args:
        model: in evaluation mode; it is left as it is.
        cfg: its config.
        classes: names by label.
        path: of the file, which is replaced once the comparison has succeeded.
        options: format, size and so on.
        images: (h, w, 3) uint8 RGB, to compare on.
        images_name: what they are, in words that follow their number.

    Raises:
        ConfigError: for an option that does not fit.
        ExportError: if the model cannot be exported, or the file disagrees with it.
        MissingPackageError: if a package of the format is not installed.
    """
    target = Path(path)
    if not isinstance(model, (SparseRCNN, GeneralizedRCNN)):
        raise ExportError(
            f"{cfg.MODEL.META_ARCHITECTURE} cannot be exported: the number of its boxes depends on "
            "the image, and exported models have fixed shapes. Models of SparseRCNN, "
            "DynamicSparseRCNN, AdaMixer, DeformableDETR and Faster R-CNN (GeneralizedRCNN) can be."
        )
    if options.format not in FORMATS:
        names = ", ".join(FORMATS)
        raise ConfigError(f"The format is {options.format!r}; write one of {names}.")
    kind = FORMATS[options.format]
    _check_size(options.size)
    if target.suffix != kind.suffix:
        raise ConfigError(
            f"The file is {str(target)!r}; files of {options.format} end with {kind.suffix}."
        )
    if options.dynamic_batch and not kind.dynamic_batch:
        raise ConfigError(
            f"{options.format} cannot have a dynamic batch; use onnx or torch-export, or one image."
        )
    kind.check()
    prepare_folder(target.parent, "The folder of the file", files=(target.name,))
    for image in images:
        check_resizing(image, options.size)
    program, info = _program(model, cfg, classes, options)
    program.half_precision = options.half
    # The model itself, which nothing is merged or rounded in, and its own evaluation.
    reference = partial(program.reference, model)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / target.name
        _write(kind, program, info, part, options)
        parity = _compare(reference, kind.open(part, exact=True), images)
        session = kind.open(part)
        model_seconds = _median(lambda: reference(images[0]))
        seconds = _median(lambda: session.run(images[0][None]))
        with part.open("rb") as content:
            write_atomically(target, lambda file: shutil.copyfileobj(content, file))
    if kind.needs_torchvision and has_deformable(program):
        _LOGGER.warning(
            "%s has deformable convolutions of torchvision: import torchvision before it is "
            "loaded, or link libtorchvision in C++.", target,
        )  # fmt: skip
    text = f"{len(images)} image{'s' * (len(images) > 1)} {images_name}".strip()
    return Export(target, info, text, parity, seconds, model_seconds)


def _check_size(size: tuple[int, int]) -> None:
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not is_pair or not all(type(s) is int and 1 <= s <= LARGEST for s in size):
        raise ConfigError(
            f"The size is {size!r}; write height and width, whole numbers from 1 to {LARGEST}."
        )


def _write(
    kind: Format, program: Program, info: ModelInfo, path: Path, options: ExportOptions
) -> None:
    try:
        with plain_system_errors(f"{path} cannot be written"):
            kind.write(program, info, path)
    except (DsrcnnError, MemoryError):
        raise
    except Exception as error:
        raise ExportError(
            f"{options.format} could not express the model: {_first_line(error)} Use another "
            "format or version of torch, and report this."
        ) from error


def _program(
    model: SparseRCNN | GeneralizedRCNN,
    cfg: CfgNode,
    classes: Sequence[str],
    options: ExportOptions,
) -> tuple[Program, ModelInfo]:
    bgr = cfg.INPUT.FORMAT == "BGR"
    program: Program
    if isinstance(model, SparseRCNN):
        detection = model.detection
        if options.nms is False:
            detection = replace(detection, nms_threshold=None)
        elif options.nms:
            detection = replace(detection, nms_threshold=cfg.MODEL.SparseRCNN.NMS.THRESHOLD)
        program = DetectionProgram(copy.deepcopy(model), options.size, detection, bgr=bgr)
    else:
        if options.nms is False:
            raise ConfigError(
                f"{cfg.MODEL.META_ARCHITECTURE} cannot do without NMS. Leave --no-nms out."
            )
        program = TwoStageProgram(copy.deepcopy(model), options.size, bgr=bgr)
    height, width = options.size
    info = ModelInfo(
        architecture=cfg.MODEL.META_ARCHITECTURE,
        classes=list(classes),
        height=height,
        width=width,
        padded_height=program.padded[0],
        padded_width=program.padded[1],
        dynamic_batch=options.dynamic_batch,
        nms=program.nms,
        half=options.half,
        detections=program.limit,
        version=__version__,
    )
    return program.eval(), info


def _compare(
    reference: Callable[[np.ndarray], Detections], session: Session, images: Sequence[np.ndarray]
) -> Parity:
    """Compare images one by one, and a batch of two if the file takes batches.

    Boxes are compared in pixels of the network input: the same difference of the network is many
    pixels of a large image, and few of a small one.
    """
    batches = [image[None] for image in images]
    if session.info.dynamic_batch:
        batches.append(np.stack([images[0], images[0][:, ::-1]]))
    expected: list[Detections] = []
    actual: list[Detections] = []
    with exact_float32():
        for batch in batches:
            scale = _scale(batch[0], session.info)
            expected += [_scaled(reference(image), scale) for image in batch]
            actual += [_scaled(detections, scale) for detections in session.run(batch)]
    return compare(expected, actual, FLOAT16 if session.info.half else FLOAT32)


def _scale(image: np.ndarray, info: ModelInfo) -> float:
    """Pixels of the network input per pixel of an image."""
    return min(info.height / image.shape[0], info.width / image.shape[1])


def _scaled(detections: Detections, scale: float) -> Detections:
    boxes, scores, labels = detections
    return boxes * scale, scores, labels


def _median(function: Callable[[], object]) -> float:
    function()  # warm-up
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".") + "."
