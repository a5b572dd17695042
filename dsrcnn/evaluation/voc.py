"""Metrics of Pascal VOC."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec


class VocEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator without the classes that the test set has no objects of.

    Detectron2 divides by their number, so one detection of such a class would make the mean NaN.
    """

    _class_names: list[str]
    _predictions: dict[int, list[str]]

    def evaluate(self) -> Any:
        """Compute AP, AP50 and AP75 on the main process; NaN for a test set without objects."""
        names, predictions = self._class_names, self._predictions
        present = self._present_classes()
        known = [index for index, name in enumerate(names) if name in present]
        if not known:
            return {"bbox": dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))}
        self._class_names = [names[index] for index in known]
        self._predictions = defaultdict(list)
        for new, old in enumerate(known):
            if old in predictions:
                self._predictions[new] = predictions[old]
        try:
            return super().evaluate()
        finally:
            self._class_names, self._predictions = names, predictions

    def _present_classes(self) -> set[str]:
        """Classes with objects that count; difficult ones do not."""
        lines = Path(self._image_set_path).read_text().splitlines()
        records = (parse_rec(self._anno_file_template.format(line.strip())) for line in lines)
        return {o["name"] for objects in records for o in objects if not int(o["difficult"])}
