"""The evaluator that fits a data set."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from ..errors import DataError
from .coco import CocoEvaluator
from .crowdhuman import CrowdHumanEvaluator
from .lvis import LvisEvaluator

__all__ = ["build_evaluator"]


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
