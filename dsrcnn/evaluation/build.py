"""The evaluator that fits a data set."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..errors import DataError
from .coco import CocoEvaluator
from .crowdhuman import CrowdHumanEvaluator

__all__ = ["LvisEvaluator", "build_evaluator"]


class LvisEvaluator(LVISEvaluator):
    """Detectron2's, with a current numpy.

    Besides AP: ``APr``, ``APc`` and ``APf`` of classes that are rare, common and frequent in the
    training set (arXiv 1908.03195). At most 300 detections of an image count, so
    ``TEST.DETECTIONS_PER_IMAGE`` should be 300.
    """

    def evaluate(self) -> Any:
        """The metrics, on the main process."""
        # lvis 0.5.3 says `np.float`, which numpy 1.24 removed.
        missing = "float" not in vars(np)
        if missing:
            np.float = float  # type: ignore[attr-defined]
        try:
            return super().evaluate()
        finally:
            if missing:
                del np.float  # type: ignore[attr-defined]


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """COCO's metrics, or CrowdHuman's, LVIS's or VOC's, by ``evaluator_type`` of the metadata.

    Raises:
        DataError: for data sets of another type.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    # Detectron2's place; several test sets must not overwrite each other's results there.
    folder = folder / name if len(cfg.DATASETS.TEST) > 1 else folder
    if kind == "coco":
        return CocoEvaluator(name, output_folder=folder)
    if kind == "crowdhuman":
        return CrowdHumanEvaluator(name, output_folder=folder)
    if kind == "lvis":
        return LvisEvaluator(name, output_dir=str(folder))
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise DataError(
        f"Data set {name!r} has evaluator_type {kind!r}; evaluators exist for 'coco', "
        "'crowdhuman', 'lvis' and 'pascal_voc'. Set MetadataCatalog.get(name).evaluator_type."
    )
