"""Draw predictions of a trained model beside the ground truth of its test set."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--images", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--threshold", type=float, default=0.3, help="smallest score (default 0.3)")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., such as MODEL.WEIGHTS model.pth"
    )


def run(args: argparse.Namespace) -> int:
    """Write the pictures and print where they are."""
    from ..engine.config import load_cfg
    from ..engine.pictures import draw_predictions

    cfg = load_cfg(args.config_file, args.opts)
    written = draw_predictions(cfg, args.output, images=args.images, threshold=args.threshold)
    print(f"{len(written)} pictures in {args.output}")
    return 0
