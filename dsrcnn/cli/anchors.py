"""Draw ASAG's anchors by level, and the patches that were probed for them."""

import argparse

from .options import add_picture_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_picture_arguments(parser, images=4)


def run(args: argparse.Namespace) -> int:
    """Write the picture; print where it is and how many anchors and patches there are."""
    from ..analysis.anchors import draw_generated_anchors
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    report = draw_generated_anchors(cfg, args.output, images=args.images)
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in report.statistics.items())
    print(f"{report.file}\nmean of an image: {numbers}")
    return 0
