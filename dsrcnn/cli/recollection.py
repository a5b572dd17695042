"""Draw routes of recollection (SQR), and objects that a stage finds but the last one loses."""

import argparse

from .options import add_picture_arguments, at_least_one

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    shown = "test images that are counted (default: 100)"
    parser.add_argument("--looked-at", type=at_least_one, default=100, help=shown)
    shown = "smallest score that counts (default: 0.3)"
    parser.add_argument("--threshold", type=float, default=0.3, help=shown)
    add_picture_arguments(parser, images=4)


def run(args: argparse.Namespace) -> int:
    """Write the pictures; print where they are and what was counted."""
    from ..analysis.recollection import draw_recollection
    from ..config.load import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    report = draw_recollection(
        cfg,
        args.output,
        images=args.images,
        looked_at=args.looked_at,
        threshold=args.threshold,
    )
    print(", ".join(map(str, report.files)))
    for stage, (found, lost) in enumerate(zip(report.found, report.lost, strict=True), start=1):
        print(f"stage {stage}: {found} of {report.objects} objects found, {lost} lost by the last")
    return 0
