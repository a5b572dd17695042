"""Draw training images as they are augmented, several times each."""

import argparse

from .options import add_picture_arguments, at_least_one

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--times", type=at_least_one, default=4, help="per image (default: 4)")
    add_picture_arguments(parser, images=4)


def run(args: argparse.Namespace) -> int:
    """Write the picture and print where it is."""
    from ..analysis.augmented import draw_augmented
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    print(draw_augmented(cfg, args.output, images=args.images, times=args.times))
    return 0
