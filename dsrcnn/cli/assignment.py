"""Draw which proposals learn which object at every stage, by Hungarian matching and by DLA."""

import argparse

from .options import add_picture_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_picture_arguments(parser, images=4)


def run(args: argparse.Namespace) -> int:
    """Write the pictures and print where they are."""
    from ..analysis.assignment import draw_assignments
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    written = draw_assignments(cfg, args.output, images=args.images)
    print(f"{len(written)} pictures in {args.output}")
    return 0
