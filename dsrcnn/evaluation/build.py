"""The evaluator that fits a data set."""

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
        return CocoEvaluator(name, output_folder=cfg.OUTPUT_DIR)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise DataError(
        f"Data set {name!r} has evaluator_type {kind!r}; evaluators exist for 'coco' and "
        "'pascal_voc'. Set MetadataCatalog.get(name).evaluator_type."
    )
