"""SQR as its first public implementation runs it: a list of groups, and one call for each.

Kept to be measured and tested against; nothing else uses it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsrcnn.modeling.decoder import Cascade
from dsrcnn.modeling.decoder.sqr import Window
from dsrcnn.structures import Predictions, Proposals

__all__ = ["refine_by_loop"]


def refine_by_loop(
    head: Cascade, features: list[Tensor], proposals: Proposals, windows: Sequence[Window]
) -> Iterator[Predictions]:
    """The predictions of every group, one after the other, in the order of the batched cascade.

    Args:
        head: whose stages are run.
        features: pyramid levels (B, D, H_l, W_l), finest first.
        proposals: initial boxes (B, P, 4) and features (B, P, D).
        windows: of all stages.
    """
    table = head.prepare(features)
    boxes, states = [proposals.boxes], [proposals.features]
    for number, (stage, window) in enumerate(zip(head.head_series, windows, strict=True)):
        for index in range(*window):
            one = boxes[index][:, None], states[index][:, None]
            logits, refined, state = head._run_stage(stage, table, *one)
            boxes.append(refined[:, 0].detach())
            states.append(state[:, 0])
            place = torch.tensor([number], device=logits.device)
            yield Predictions(logits.transpose(0, 1), refined.transpose(0, 1), place)
        if number == 0 and head.detach_init_boxes:
            boxes[0] = boxes[0].detach()
