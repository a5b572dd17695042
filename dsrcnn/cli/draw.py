"""Draw predictions of a trained model beside the ground truth of its test set."""

import argparse

from .options import add_picture_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--threshold", type=float, default=0.3, help="smallest score (default 0.3)")
    add_picture_arguments(parser, images=8)


def run(args: argparse.Namespace) -> int:
    """Write the pictures and print where they are."""
    from ..analysis.predictions import draw_predictions
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    written = draw_predictions(cfg, args.output, images=args.images, threshold=args.threshold)
    print(f"{len(written)} pictures in {args.output}")
    return 0
