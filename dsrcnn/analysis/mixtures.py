"""Whether DPG's mixtures fit their images: a permutation test."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, cast

import torch
from detectron2.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..data.mapper import DetectionMapper
from ..engine.console import progress_bar
from ..errors import DataError
from ..modeling import SparseRCNN
from ..modeling.proposals import DynamicProposals
from ..structures import Proposals, Targets, box_cxcywh_to_xyxy
from ..visualization.draw import evenly_spaced
from .images import load_records


class PermutationTest(NamedTuple):
    """Mean loss over images, by the mixture that an image starts from.

    Attributes:
        own: with the mixture of the image itself.
        others: with the mixture of another image, once for each permutation of the images.
        average: with the mean of all mixtures.
    """

    own: float
    others: list[float]
    average: float

    @property
    def deviations(self) -> float:
        """Standard deviations of `others` by which `own` is lower than their mean.

        Above 2 the mixtures fit their images better than chance explains.
        """
        return (mean(self.others) - self.own) / max(stdev(self.others), 1e-12)

    def statistics(self) -> dict[str, float]:
        """Name the numbers, to print."""
        return {
            "loss with own mixtures": self.own,
            "with others'": mean(self.others),
            "its deviation": stdev(self.others),
            "with the average": self.average,
            "own is lower by deviations": self.deviations,
        }


@torch.no_grad()
def permutation_test(
    model: SparseRCNN, inputs: Sequence[dict[str, Any]], *, permutations: int = 20
) -> PermutationTest:
    """Compare the loss of images with their own mixtures to that with those of other images.

    Images are put into random order once; permutation k gives each the mixture of the k-th after
    it, so none ever gets its own.

    Args:
        model: with DPG, in evaluation mode.
        inputs: model inputs with ``instances``, at least three.
        permutations: at least two; at most one less than there are images.

    Raises:
        DataError: for too few images.
    """
    if len(inputs) < 3:
        raise DataError(
            f"The permutation test has {len(inputs)} annotated test images; give it at least 3."
        )
    dpg = cast(DynamicProposals, model.proposals)
    # Pyramids of all images do not fit into memory, so the backbone runs twice.
    weights = torch.cat([_weights(model, x) for x in progress_bar(inputs, desc="mixtures")])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    position = order.argsort()
    shifts = torch.arange(max(2, min(permutations, len(inputs) - 1)) + 1)  # 0: its own
    losses = []
    for index, record in enumerate(progress_bar(inputs, desc="losses")):
        chosen = weights[order[(position[index] + shifts) % len(inputs)]]
        mixtures = torch.cat([chosen, weights.mean(dim=0, keepdim=True)])
        losses.append(_losses(model, record, *dpg.mix(mixtures)))
    own, *others, average = torch.stack(losses).mean(dim=0).tolist()
    return PermutationTest(own, others, average)


def _weights(model: SparseRCNN, record: dict[str, Any]) -> Tensor:
    """Weights (1, E, P) of the experts for an image."""
    dpg = cast(DynamicProposals, model.proposals)
    images = model.preprocess_image([record])
    return dpg.mixing_weights(dpg.logits(model.extract_features(images), images.sizes))


def _losses(model: SparseRCNN, record: dict[str, Any], boxes: Tensor, features: Tensor) -> Tensor:
    """Sum of all losses of an image from each of K mixtures: boxes (K, P, 4), features (K, P, D).

    Returns (K,).
    """
    images = model.preprocess_image([record])
    count = len(boxes)
    sizes = images.sizes.expand(count, -1)
    levels = [x.expand(count, -1, -1, -1) for x in model.extract_features(images)]
    proposals = Proposals(box_cxcywh_to_xyxy(boxes) * sizes.unsqueeze(1), features)
    predictions = model.head(levels, proposals, all_stages=model.head.deep_supervision)
    targets = Targets.from_inputs([record] * count, sizes)
    assignment = model.matcher(predictions, targets)
    totals = []
    for k in range(count):
        part = predictions._replace(
            logits=predictions.logits[:, k : k + 1], boxes=predictions.boxes[:, k : k + 1]
        )
        target = Targets(*(x[k : k + 1] for x in targets))
        losses = model.criterion(part, target, assignment[:, k : k + 1])
        totals.append(torch.stack(list(losses.values())).sum())
    return torch.stack(totals)


def annotated_test_images(cfg: CfgNode, count: int) -> list[dict[str, Any]]:
    """Load at most `count` annotated test images, evenly spaced, with ``instances``."""
    records = [r for r in load_records(cfg, "TEST")[0] if r["annotations"]]
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    return [mapper(records[index]) for index in evenly_spaced(len(records), count)]


def draw_permutation_test(result: PermutationTest, output: Path) -> Path:
    """Draw the losses: a histogram of other images' mixtures, lines for own and average."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(result.others, color="tab:gray", alpha=0.6, label="of other images, permuted")
    axes.axvline(result.own, color="tab:blue", label="of the image itself")
    axes.axvline(result.average, color="tab:orange", linestyle="--", label="average of all")
    axes.set_xlabel("mean loss of test images, by mixture")
    axes.set_ylabel("permutations")
    axes.set_title(f"own mixtures are lower by {result.deviations:.1f} standard deviations")
    axes.legend()
    figure.savefig(output, dpi=110)
    return output
