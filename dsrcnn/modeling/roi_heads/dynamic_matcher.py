"""Dynamic label assignment of Dynamic R-CNN: one IoU threshold that follows the proposals.

Not the DLA of Dynamic Sparse R-CNN, which is another method (`dsrcnn.modeling.matching`).
"""

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

__all__ = ["DynamicMatcher"]


class DynamicMatcher(Matcher):
    """Detectron2's matcher with one threshold, that remembers how good the proposals were."""

    def __init__(self, threshold: float, *, dynamic: bool = True, skip_last: bool = False) -> None:
        """Set the threshold to begin with.

        Args:
            threshold: proposals of at least this IoU are foreground, all others background.
            dynamic: whether `begin` may change it.
            skip_last: leave ground truths, which stand behind the proposals, out of the statistic.
        """
        super().__init__([threshold], [0, 1], allow_low_quality_matches=False)
        self.dynamic = dynamic
        self.skip_last = skip_last
        self._best: list[Tensor] = []

    def begin(self, threshold: Tensor) -> None:
        """Begin an iteration with a threshold () on the device."""
        self._best.clear()
        if self.dynamic:
            self.thresholds[1] = threshold

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match as the base class does; (M, N) IoUs of an image's objects with its proposals."""
        objects = len(match_quality_matrix)
        if objects:
            ious = match_quality_matrix[:, :-objects] if self.skip_last else match_quality_matrix
            self._best.append(ious.max(dim=0).values)
        matches, labels = super().__call__(match_quality_matrix)
        return matches, labels

    def statistic(self, rank: int, *, by_image: bool = True) -> Tensor:
        """The IoU of the proposal of this rank, () or NaN where there is no object.

        Args:
            rank: per image; where there are fewer proposals, the last one's.
            by_image: the mean over images of each one's; otherwise that of `rank` times the images
                among all of them.
        """
        best = [ious for ious in self._best if len(ious)]
        if not best:
            return torch.tensor(torch.nan)
        if not by_image:
            best, rank = [torch.cat(best)], rank * len(best)
        values = [ious.topk(min(rank, len(ious))).values[-1] for ious in best]
        return torch.stack(values).mean()
