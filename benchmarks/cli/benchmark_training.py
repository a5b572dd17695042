"""Time and memory of training iterations by option, and the speed of the loader."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names = "float32, bf16, fp16, accumulate (2 parts), checkpoint (backbone and stages), compile, "
    names += "dla, dpg, dla-dpg, sqr3, sqr1, dla-sqr3, dla-sqr1"
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument(
        "--options",
        nargs="+",
        default=["float32", "bf16", "accumulate", "checkpoint", "compile"],
        help=f"of {names}; ratios are to the first",
    )
    parser.add_argument("--images", type=int, default=2, help="batch size (default: 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--objects", type=int, default=7, help="per image (default: 7)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument(
        "--loader", action="store_true", help="also time the loader on the config's training data"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for all")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from benchmarks.loader import images_per_second
    from benchmarks.training import OPTIONS, compare_options, table_of_options
    from dsrcnn.errors import ConfigError

    for name in args.options:
        if name not in OPTIONS:
            raise ConfigError(f"--options names {name!r}; write some of {', '.join(OPTIONS)}.")
    height, width = args.size
    shape = {"images": args.images, "height": height, "width": width, "objects": args.objects}
    measured = compare_options(
        args.config_file,
        args.options,
        args.set,
        repeats=args.repeats,
        threads=args.threads,
        **shape,
    )
    print(f"\n{args.images} images {height}x{width}, {args.repeats} rounds, medians\n")
    print(table_of_options(measured))
    if args.loader:
        speed = images_per_second(args.config_file, args.set)
        needed = max(args.images / m.median("iteration") for m in measured)
        print(f"\nloader: {speed:.1f} images/s; the fastest of the above takes {needed:.1f}")
    return 0
