"""Draw which proposals learn which object at every stage, by Hungarian matching and by DLA."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--images", type=int, default=4, help="how many (default: 4)")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., such as MODEL.WEIGHTS model.pth"
    )


def run(args: argparse.Namespace) -> int:
    """Write the pictures and print where they are."""
    from ..engine.assignment_pictures import draw_assignments
    from ..engine.config import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    written = draw_assignments(cfg, args.output, images=args.images)
    print(f"{len(written)} pictures in {args.output}")
    return 0
