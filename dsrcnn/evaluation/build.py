"""Choice of the evaluator for a dataset."""

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator

from ..errors import DataError
from .coco import CocoEvaluator
from .crowdhuman import CrowdHumanEvaluator


class LvisEvaluator(LVISEvaluator):
    """Detectron2's LVIS evaluator, usable with a current numpy.

    Besides AP: ``APr``, ``APc`` and ``APf`` of classes that are rare, common and frequent in the
    training set (arXiv 1908.03195). Up to 300 detections per image count, so
    ``TEST.DETECTIONS_PER_IMAGE`` should be 300.
    """

    def evaluate(self) -> Any:
        """Compute the metrics on the main process."""
        missing = "float" not in vars(np)
        if missing:  # lvis 0.5.3 uses `np.float`, which numpy 1.24 removed
            np.float = float  # type: ignore[attr-defined]
        try:
            return super().evaluate()
        finally:
            if missing:
                del np.float  # type: ignore[attr-defined]


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """Build the evaluator of a dataset by the ``evaluator_type`` of its metadata.

    Raises:
        DataError: for an unknown ``evaluator_type``.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    # Detectron2's folder; several test sets must not overwrite each other's results there.
    folder = folder / name if len(cfg.DATASETS.TEST) > 1 else folder
    if kind == "coco":
        return CocoEvaluator(name, folder)
    if kind == "crowdhuman":
        return CrowdHumanEvaluator(name, folder)
    if kind == "lvis":
        return LvisEvaluator(name, output_dir=str(folder))
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise DataError(
        f"Dataset {name!r} has evaluator_type {kind!r}; evaluators exist for 'coco', "
        "'crowdhuman', 'lvis' and 'pascal_voc'. Set MetadataCatalog.get(name).evaluator_type."
    )
