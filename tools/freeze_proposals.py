#!/usr/bin/env python
r"""Convert a model with DPG to a static Sparse R-CNN that starts from the mean of its proposals.

The mean is over training images. The file has the official keys and needs no DPG; evaluate it to
see what that costs in accuracy.

    python tools/freeze_proposals.py --config-file output/run/config.yaml --target static.pth \
        MODEL.WEIGHTS output/run/model_final.pth
"""

import argparse

import dsrcnn  # before detectron2

# isort: split
import torch

from dsrcnn.analysis.images import load_predictor, training_images
from dsrcnn.analysis.proposals import mixing_weights
from dsrcnn.config.validate import architecture_of
from dsrcnn.engine.console import progress_bar


@torch.no_grad()
def frozen_state(cfg, images: int) -> dict[str, torch.Tensor]:
    """Return the state dict of the static model."""
    model = load_predictor(cfg).model
    weights = mixing_weights(model, progress_bar(training_images(cfg, images)))
    # Mixing is linear: the mean of the mixtures is the mixture by mean weights.
    (boxes,), (features,) = model.proposals.mix(weights.mean(dim=0, keepdim=True))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("proposal_generator.")}
    state["init_proposal_boxes.weight"] = boxes
    state["init_proposal_features.weight"] = features
    return {k: v.cpu() for k, v in state.items()}


def main() -> None:
    """Load, average, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of the model with DPG")
    parser.add_argument("--target", required=True, help="checkpoint to write")
    parser.add_argument("--images", type=int, default=200, help="to average over (default: 200)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...: MODEL.WEIGHTS")
    args = parser.parse_args()
    cfg = dsrcnn.load_cfg(args.config_file, args.opts)
    if not cfg.MODEL.SparseRCNN.DPG.ENABLED:
        parser.error("MODEL.SparseRCNN.DPG.ENABLED is False: the model is static already")
    torch.save({"model": frozen_state(cfg, args.images)}, args.target)
    keys = "MODEL.SparseRCNN.DPG.ENABLED False"
    if architecture_of(cfg).default_proposals != "LearnedProposals":  # AdaMixer's have no boxes
        keys += " MODEL.SparseRCNN.PROPOSALS.NAME LearnedProposals"
    print(f"{args.target}: evaluate it with {keys}")


if __name__ == "__main__":
    main()
