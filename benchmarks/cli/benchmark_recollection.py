"""Time and memory of the cascade's training step with recollection (SQR), by start."""

import argparse

__all__ = ["add_arguments", "run"]

_VARIANT = r"dense|(loop|official)-[1-9]\d*|(start|checkpoint)-[1-9]\d*(-chunk-[1-9]\d*)?"
_LOOPS = ("loop-1", "official-1")
_CHECKPOINTS = ("checkpoint-1", "checkpoint-1-chunk-4", "checkpoint-1-chunk-1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config-file", default="coco/sparse_rcnn_R50_100pro_3x", help="YAML file or shipped name"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["start-3", "start-2", "start-1", "dense", *_LOOPS, *_CHECKPOINTS],
        help="of start-<stage>, dense, loop-<stage> (one call a group), official-<stage> (the "
        "same, pooled as the official head does), checkpoint-<stage>; start and checkpoint with "
        "-chunk-<groups>, too",
    )
    parser.add_argument("--images", type=int, default=2, help="batch size (default: 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--objects", type=int, default=7, help="per image (default: 7)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for all")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    import re

    from benchmarks.recollection import compare_recollection
    from dsrcnn.errors import ConfigError

    for name in args.variants:
        if not re.fullmatch(_VARIANT, name):
            raise ConfigError(
                f"--variants names {name!r}; write dense, start-<stage>, loop-<stage>, "
                "official-<stage> or checkpoint-<stage>, such as start-1 or checkpoint-1-chunk-4."
            )
    height, width = args.size
    shape = {"images": args.images, "height": height, "width": width, "objects": args.objects}
    table = compare_recollection(
        args.config_file, args.variants, args.set, repeats=args.repeats, **shape
    )
    print(f"\n{args.images} images {height}x{width}, {args.repeats} rounds, medians\n\n{table}")
    return 0
