"""Draw the initial proposals of several images, and how DPG mixed them from experts."""

import argparse

from .options import add_picture_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_picture_arguments(parser, images=4)


def run(args: argparse.Namespace) -> int:
    """Write the pictures; print where they are and how different the mixtures are."""
    from ..analysis.proposals import draw_initial_proposals
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    report = draw_initial_proposals(cfg, args.output, images=args.images)
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in report.statistics.items())
    print(f"{', '.join(map(str, report.files))}\n{numbers}")
    return 0
