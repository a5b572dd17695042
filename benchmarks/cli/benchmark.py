"""Time training steps and inference by part; compare two configs or checkouts in one run."""

import argparse
import shlex

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name: variant A")
    parser.add_argument("--against", help="config of variant B (default: that of A)")
    parser.add_argument("--checkout", help="folder of the checkout that A runs from")
    parser.add_argument("--against-checkout", help="folder of the checkout that B runs from")
    parser.add_argument("--against-opts", default="", help="'KEY VALUE ...' for B only")
    parser.add_argument(
        "--against-without",
        default="",
        metavar="NAMES",
        help="optimisations undone in B, comma separated: norms,layout,pooling,optimizer; all four "
        "are the common way of computing",
    )
    parser.add_argument("--mode", choices=["train", "inference", "both"], default="both")
    parser.add_argument("--images", type=int, default=2, help="batch size (default: 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--objects", type=int, default=7, help="per image (default: 7)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... for A and B")


def run(args: argparse.Namespace) -> int:
    """Print one table per mode."""
    from benchmarks.speed import Variant, compare, format_table

    variants = [Variant("A", args.config_file, args.opts, args.checkout, [])]
    opts = [*args.opts, *shlex.split(args.against_opts)]
    config, without = args.against or args.config_file, args.against_without.split(",")
    against = Variant("B", config, opts, args.against_checkout, [name for name in without if name])
    if against != variants[0]._replace(name="B"):
        variants.append(against)
    for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
        measured = compare(
            variants,
            mode=mode,
            images=args.images,
            height=args.size[0],
            width=args.size[1],
            objects=args.objects,
            repeats=args.repeats,
            threads=args.threads,
        )
        height, width = args.size
        print(f"\n{mode}: {args.images} images {height}x{width}, {args.repeats} rounds, medians\n")
        print(format_table(measured))
    return 0
