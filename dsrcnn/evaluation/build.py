"""Choice of the evaluator for a dataset."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator

from ..data.build import explain_data_errors
from ..errors import DataError
from .coco import CocoEvaluator
from .crowdhuman import CrowdHumanEvaluator
from .voc import VocEvaluator

_METADATA = {  # that the evaluators need
    "coco": (),
    "crowdhuman": ("json_file",),
    "lvis": ("json_file",),
    "pascal_voc": ("dirname", "split", "year", "thing_classes"),
}


class LvisEvaluator(LVISEvaluator):
    """Detectron2's LVIS evaluator, usable with a current numpy.

    Besides AP: ``APr``, ``APc`` and ``APf`` of classes that are rare, common and frequent in the
    training set (arXiv 1908.03195). Up to 300 detections per image count, so
    ``TEST.DETECTIONS_PER_IMAGE`` should be 300.
    """

    def evaluate(self) -> Any:
        """Compute the metrics on the main process; NaN for groups without objects."""
        missing = "float" not in vars(np)
        if missing:  # lvis 0.5.3 uses `np.float`, which numpy 1.24 removed
            np.float = float  # type: ignore[attr-defined]
        try:
            results = super().evaluate() or {}
        finally:
            if missing:
                del np.float  # type: ignore[attr-defined]
        # lvis says -1, and Detectron2 100 times that.
        return {
            task: {name: value if value >= 0 else float("nan") for name, value in metrics.items()}
            for task, metrics in results.items()
        }


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """Build the evaluator of a dataset by the ``evaluator_type`` of its metadata.

    Raises:
        DataError: for an unknown ``evaluator_type``, or one whose files or other metadata are
            missing or broken.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type", "coco")
    if kind not in tuple(_METADATA):
        *most, last = map(repr, _METADATA)
        raise DataError(
            f"Dataset {name!r} has evaluator_type {kind!r}; evaluators exist for "
            f"{', '.join(most)} and {last}. Set MetadataCatalog.get(name).evaluator_type."
        )
    missing = [key for key in _METADATA[kind] if not metadata.get(key)]
    if missing:
        raise DataError(
            f"Dataset {name!r} has evaluator_type {kind!r}, which needs the metadata "
            f"{', '.join(missing)}. Set them by MetadataCatalog.get({name!r}).set(...), or set "
            "evaluator_type='coco'."
        )
    with explain_data_errors(name):
        return _build(cfg, name, kind)


def _build(cfg: CfgNode, name: str, kind: str) -> DatasetEvaluator:
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    # Detectron2's folder; several test sets must not overwrite each other's results there.
    folder = folder / name if len(cfg.DATASETS.TEST) > 1 else folder
    if kind == "coco":
        return CocoEvaluator(name, folder, max_detections=cfg.TEST.MAX_DETECTIONS)
    if kind == "crowdhuman":
        return CrowdHumanEvaluator(name, folder)
    if kind == "lvis":
        return LvisEvaluator(name, output_dir=str(folder))
    return VocEvaluator(name)
