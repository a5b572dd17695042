"""LVIS's metrics, which know that not every image is annotated for every class."""

from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator

__all__ = ["LvisEvaluator"]


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
