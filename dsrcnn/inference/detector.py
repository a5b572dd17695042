"""A trained detector: ``dsrcnn.load(...).predict(...)``."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from matplotlib import cbook

from ..config.load import DATASET_KEYS, NO_DATA, load_cfg, read_cfg
from ..config.rules import value_of
from ..config.validate import num_classes_key
from ..data.build import load_records
from ..data.datasets.custom import class_names
from ..data.transforms.geometric import Resize
from ..engine.checkpoint import load_trained, without_weights
from ..engine.main import evaluate, train
from ..engine.resume import best_weights
from ..engine.weight_io import read_any
from ..errors import ConfigError, DataError, WeightsError
from ..export import Export, ExportOptions, export_model
from .model import ModelPredictor
from .sources import readers

_LOGGER = logging.getLogger(__name__)
_LANDSCAPE = (480, 640)  # height and width of most photographs
_CLASSES = "DATASETS.CUSTOM.CLASSES"
_COMPARED = 8  # images that an exported file is compared on
_WEIGHT_FILES = (".pth", ".pkl", ".safetensors")


def load(
    model: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    opts: Sequence[object] = (),
) -> "Detector":
    """Load a trained detector.

    Args:
        model: output folder of a training run, whose best or else last weights are taken; or a
            weight file of this package, which contains its config; or a config, as a path or a
            shipped name, together with `weights`.
        weights: ``.pth``, ``.pkl`` or ``.safetensors``, official checkpoints included.
        device: such as ``cuda:1``; None for CUDA if there is any.
        opts: overrides ``KEY, VALUE, KEY, VALUE ...``.

    Raises:
        ConfigError: if there is no such model, or it needs `weights`.
        WeightsError: if the weights are missing, damaged or do not fill the model.
    """
    path, options = os.fspath(model), [*opts]
    if os.path.isdir(path):
        path = os.path.abspath(path)  # evaluation comes later, maybe from another working folder
    if device is not None:
        options += ["MODEL.DEVICE", device]
    with tempfile.TemporaryDirectory() as folder:
        config: str | Path = path
        output = _option(opts, "OUTPUT_DIR")
        if os.path.isdir(path):
            output = output or path  # the folder may have been moved
            config = Path(path) / "config.yaml"
            if not config.is_file():
                raise ConfigError(
                    f"{config} does not exist. Give the output folder of a training run, a weight "
                    "file, or a config with weights."
                )
            if weights is None and "MODEL.WEIGHTS" not in opts:
                weights = best_weights(Path(path))
        elif path.endswith(".onnx"):
            raise ConfigError(
                f"The model {path!r} is an exported one; write dsrcnn.load_exported(...) or "
                "dsrcnn predict --model."
            )
        elif path.endswith((".pt2", ".torchscript")):
            raise ConfigError(
                f"The model {path!r} is an exported one, which torch loads without dsrcnn "
                "(docs/EXPORT.md). Give the run folder or weight file that it was made of, or an "
                "ONNX file to dsrcnn.load_exported(...)."
            )
        elif path.endswith(_WEIGHT_FILES):
            if weights is not None or "MODEL.WEIGHTS" in opts:
                raise ConfigError(
                    f"The model {path!r} is a weight file, so other weights are too many. Write a "
                    "config with weights, or the weight file alone."
                )
            weights = path
            config = Path(folder) / "config.yaml"
            config.write_text(_config_in(path), encoding="utf-8")
        elif weights is None and "MODEL.WEIGHTS" not in opts:
            read_cfg(path, opts)  # a name that does not exist is the better message
            raise ConfigError(
                f"The model {path!r} is a config; give weights, too: a file that was trained with "
                "it. A run folder or a weight file of a run alone will do."
            )
        if weights is not None:
            options += ["MODEL.WEIGHTS", os.fspath(weights)]
        if output is not None:
            options += ["OUTPUT_DIR", output]
        return Detector(*_load_cfg(config, options), output=output)


def _option(opts: Sequence[object], key: str) -> str | None:
    """Value of a key in overrides, None without it."""
    pairs = dict(zip(opts[::2], opts[1::2], strict=False))
    return str(pairs[key]) if key in pairs else None


def _config_in(path: str) -> str:
    content = read_any(path)
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, str):
        raise WeightsError(
            f"{path!r} has weights but no config, so its model is unknown. Give the config, too: "
            "dsrcnn.load('coco/sparse_rcnn_R50_100pro_3x', weights=...), on the command line "
            "--config."
        )
    return config


def _load_cfg(
    config: str | Path, opts: list[object]
) -> tuple[CfgNode, list[str], dict[str, object]]:
    """Read a config without its datasets.

    Returns:
        It, the class names that are known, and the keys of its datasets.
    """
    cfg = read_cfg(config, opts)
    data = {str(key): value_of(cfg, str(key)) for key in NO_DATA[::2]}
    if cfg.DATASETS.CUSTOM.NAME or cfg.DATASETS.CUSTOM.FOLDER:  # they name the sets
        data = {k: v for k, v in data.items() if not (v and k in DATASET_KEYS)}
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    saved = list(cfg.DATASETS.CUSTOM.CLASSES)  # by the training run
    names = saved or next((n for n in map(class_names, datasets) if n), [])
    key = num_classes_key(cfg)
    # Data are not there where a model is used, and a config from elsewhere runs no programs.
    options = [*opts, *NO_DATA, "HOOKS.AFTER_EVAL", "()"]
    is_chosen = "MODEL.DEVICE" in opts  # then a missing GPU is worth a note
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available() and not is_chosen:
        options += ["MODEL.DEVICE", "cpu"]
    if key is not None and value_of(cfg, key) == 0:
        content = read_any(cfg.MODEL.WEIGHTS, trust=cfg.MODEL.TRUST_WEIGHTS)
        names = _classes_in(content) or saved
        if not names:
            raise ConfigError(
                f"{key} is 0, from the data, and {cfg.MODEL.WEIGHTS} has no class names. Write "
                f"{key} and the number of classes the model was trained with."
            )
        options += [key, len(names)]
    return load_cfg(config, options), names, data


def _classes_in(content: Any) -> list[str]:
    """Class names in the content of a weight file, none if there are none."""
    names = content.get("classes") if isinstance(content, dict) else None
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


class Detector(ModelPredictor):
    """A trained detector.

    `predict` is that of `Predictor`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        classes: Sequence[str] = (),
        data: Mapping[str, object] | None = None,
        output: str | None = None,
    ) -> None:
        """Build the model and load ``MODEL.WEIGHTS``; see `load`.

        Args:
            cfg: config without datasets.
            classes: names; those in the weights replace them, without any they are numbers.
            data: config keys of the datasets that `evaluate` and `train` use by default.
            output: folder that `evaluate` writes to; None for one that is deleted afterwards.
        """
        model = build_model(without_weights(cfg))
        content = load_trained(model, cfg)
        key = num_classes_key(cfg)
        count = value_of(cfg, key) if key else len(classes)
        known = _classes_in(content) or list(classes)
        self._has_names = len(known) == count
        known = known if self._has_names else [str(label) for label in range(count)]
        super().__init__(cfg.clone(), model, known)
        self._data, self._output = dict(data or {}), output

    def __repr__(self) -> str:
        """Name the architecture, the weights and the classes."""
        name, weights = self.cfg.MODEL.META_ARCHITECTURE, self.cfg.MODEL.WEIGHTS
        return f"Detector({name}, {len(self.classes)} classes, weights={weights!r})"

    def evaluate(
        self, data: str | os.PathLike[str] | None = None, **overrides: Any
    ) -> dict[str, Any]:
        """Evaluate on the test set of the run or config, or on the ``val`` split of a folder.

        Results are written to ``inference`` in the run folder, or in ``OUTPUT_DIR`` if that is
        among the overrides, here or in `load`. For other models they are not kept.

        Args:
            data: folder in the layout of COCO, Pascal VOC or YOLO.
            **overrides: config keys, ``**{"TEST.DETECTIONS_PER_IMAGE": 300}``.

        Returns:
            Metrics by task, such as ``{"bbox": {"AP": ...}}``.

        Raises:
            DataError: if there is no test set, it cannot be read, or it has other classes than the
                model.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = {"OUTPUT_DIR": self._output or folder}
            cfg = self.cfg_with(data, **{**output, **overrides})
            if not cfg.DATASETS.TEST:
                raise DataError("There is no test set; give a folder with a val split.")
            return evaluate(cfg)

    def cfg_with(self, data: str | os.PathLike[str] | None = None, **overrides: Any) -> CfgNode:
        """Return the config of the model with data.

        Args:
            data: folder in the layout of COCO, Pascal VOC or YOLO; None for that of `overrides`, or
                else of the run or config.
            **overrides: config keys.

        Raises:
            DataError: if the data cannot be read, or name other classes than the model.
        """
        # Classes of a folder are compared with the saved ones, which are those of the model, unless
        # the caller says that other names mean the same.
        compared = self._has_names and _CLASSES not in overrides
        classes = [_CLASSES, tuple(self.classes)] if compared else []
        with _config_file(self.cfg) as path:
            cfg = load_cfg(path, [*self._opts(data, overrides), *classes])
        for name in cfg.DATASETS.TEST if compared else ():
            self._check_classes(name)
        return cfg

    def _check_classes(self, dataset: str) -> None:
        """Raise a `DataError` if a dataset names other classes than the model."""
        names = class_names(dataset) or self.classes
        for label, (own, other) in enumerate(zip(self.classes, names, strict=False)):
            if own != other:
                raise DataError(
                    f"Class {label} is {own!r} in the model and {other!r} in dataset {dataset!r}. "
                    "Evaluate on data with the classes of the model, in the same order; if these "
                    f"mean the same, write {_CLASSES} ()."
                )

    def train(
        self, data: str | os.PathLike[str] | None = None, *, output: str, **overrides: Any
    ) -> "Detector":
        """Fine-tune on a folder, from these weights, in this process.

        Args:
            data: folder in the layout of COCO, Pascal VOC or YOLO; None for that of `overrides`, or
                else of the run or config.
            output: folder of the run.
            **overrides: config keys, ``**{"SOLVER.MAX_ITER": 3000}``.

        Returns:
            The trained detector, with the best weights of the run if it has such.
        """
        key = num_classes_key(self.cfg)
        classes = {key: 0} if key and data is not None else {}
        with _config_file(self.cfg) as path:
            opts = self._opts(data, {**classes, "OUTPUT_DIR": output, **overrides})
            train(path, [str(word) for word in opts])
        return load(output, device=self.cfg.MODEL.DEVICE)

    def export(
        self,
        path: str | os.PathLike[str],
        format: str = "onnx",
        *,
        size: tuple[int, int] | None = None,
        dynamic_batch: bool = False,
        nms: bool | None = None,
        half: bool = False,
        images: Any = None,
    ) -> Export:
        """Write the detector to a file that other programs run, and compare it with the model.

        Args:
            path: of the file.
            format: ``onnx``, ``torch-export`` or ``torchscript``.
            size: height and width in pixels that images are resized to fit inside; None for the
                size at which evaluation sees the middle test image by aspect ratio, or an image of
                480 x 640 pixels if no test set can be read.
            dynamic_batch: accept any number of images of one size.
            nms: False to leave out NMS, True to demand it; None for the model's choice.
            half: float16 for convolutions and linear layers.
            images: source as in `predict` to compare on; None for the test set, or a sample
                photograph where it is gone.

        Raises:
            ConfigError: for an option that does not fit.
            ExportError: if the model cannot be exported, or the file disagrees with it.
            MissingPackageError: if a package of the format is not installed.
        """
        records = self._test_records()
        pixels, name = self._comparison_images(images, records)
        options = ExportOptions(format, size or self._usual_size(records), dynamic_batch, nms, half)
        return export_model(self.model, self.cfg, self.classes, path, options, pixels, name)

    def _test_records(self) -> list[dict[str, Any]]:
        """Records of the first test set, none where the data are not."""
        try:
            cfg = self.cfg_with()
            return load_records(cfg.DATASETS.TEST[0], for_training=False)
        except (DataError, ConfigError, IndexError) as error:
            _LOGGER.info("Exporting without the test set: %s", error)
            return []

    def _usual_size(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """Height and width at which evaluation sees the middle image by aspect ratio."""
        shapes = [(r["height"], r["width"]) for r in records if "height" in r]
        shapes = sorted(shapes, key=lambda shape: shape[0] / shape[1]) or [_LANDSCAPE]
        middle = np.empty((*shapes[len(shapes) // 2], 3), dtype=np.uint8)
        resized = Resize(self.resizing()).get_transform(middle).apply_image(middle)
        return resized.shape[0], resized.shape[1]

    def _comparison_images(
        self, source: Any, records: list[dict[str, Any]]
    ) -> tuple[list[np.ndarray], str]:
        """Up to eight images (h, w, 3) RGB of a source or else of records, and what they are."""
        name = "of the source"
        if source is None and records:
            step = max(len(records) // _COMPARED, 1)
            source = [record["file_name"] for record in records[::step]]
            name = "of the test set"
        elif source is None:
            source = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
            name = "that Matplotlib ships, as no test set can be read"
        images = []
        for reader in islice(readers(source), _COMPARED):
            with suppress(DataError):  # others will do
                image = reader().image
                assert image is not None
                images.append(image)
        if not images:
            raise DataError("No image can be read to compare the exported file on; give others.")
        return images, name

    def _opts(
        self, data: str | os.PathLike[str] | None, overrides: Mapping[str, Any]
    ) -> list[object]:
        if data is not None:
            source: dict[str, object] = {"DATASETS.CUSTOM.FOLDER": os.path.abspath(data)}
        elif any(key.startswith("DATASETS.") for key in overrides):
            source = {}
        else:
            source = self._data
        return [word for pair in {**source, **overrides}.items() for word in pair]


@contextmanager
def _config_file(cfg: CfgNode) -> Iterator[str]:
    """Write a config to a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        Path(path).write_text(cfg.dump(), encoding="utf-8")
        yield path
