"""Time of ASAG's inference by level beside that of a cascade, and of its patches."""

import argparse

from dsrcnn.cli.options import at_least_one

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--baseline", default="coco/sparse_rcnn_R50_100pro_3x", help="a cascade")
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["coco/asag_s_R50_100pro_3x", "coco/asag_a_R50_100pro_3x"],
        help="of ASAG",
    )
    parser.add_argument("--images", type=at_least_one, default=1, help="batch size (default: 1)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--queries", type=at_least_one, default=100, help="default: 100")
    parser.add_argument("--patches", type=at_least_one, default=5, help="of a level (default: 5)")
    parser.add_argument("--repeats", type=at_least_one, default=7, help="rounds (default: 7)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for all")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from benchmarks.asag import compare_inference, compare_patches

    height, width = args.size
    table = compare_inference(
        args.baseline,
        args.configs,
        args.set,
        images=args.images,
        height=height,
        width=width,
        queries=args.queries,
        patches=args.patches,
        repeats=args.repeats,
    )
    print(
        f"\n{args.images} images {height}x{width}, {args.queries} queries, {args.patches} patches "
        f"of a probed level, {args.repeats} rounds, medians\n\n{table}"
    )
    print(f"\nP3 of one image 800x1333, milliseconds\n\n{compare_patches(repeats=args.repeats)}")
    return 0
