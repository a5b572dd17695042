"""The evaluator that fits a data set."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from ..errors import DataError
from .coco import CocoEvaluator

__all__ = ["build_evaluator"]


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """COCO metrics for COCO-like data sets, VOC's for VOC, by ``evaluator_type`` of the metadata.

    Raises:
        DataError: for data sets of another type.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
    if kind == "coco":
        folder = Path(cfg.OUTPUT_DIR) / "inference"
        # Detectron2's place; several test sets must not overwrite each other's results there.
        folder = folder / name if len(cfg.DATASETS.TEST) > 1 else folder
        return CocoEvaluator(name, output_folder=folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise DataError(
        f"Data set {name!r} has evaluator_type {kind!r}; evaluators exist for 'coco' and "
        "'pascal_voc'. Set MetadataCatalog.get(name).evaluator_type."
    )
