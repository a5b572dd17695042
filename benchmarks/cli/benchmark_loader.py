"""Images per second of the loader by augmentation, and how long training waits for them."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config-file", required=True, help="YAML file or shipped name")
    parser.add_argument(
        "--pipelines",
        nargs="+",
        default=["plain", "plain-opencv", "colours-warp", "mosaic-mixup", "albumentations"],
        help="of plain, plain-opencv, colours-warp, mosaic-mixup, mosaic-mixup-opencv and "
        "albumentations; ratios are to the first",
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument("--batches", type=int, default=30, help="in a round (default: 30)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=0,
        help="of training, in which waiting is measured (default: 0, none)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for all")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from benchmarks.loader import PIPELINES, compare_pipelines
    from dsrcnn.errors import ConfigError

    for name in args.pipelines:
        if name not in PIPELINES:
            raise ConfigError(f"--pipelines names {name!r}; write some of {', '.join(PIPELINES)}.")
    opts = [*args.set, "DATALOADER.NUM_WORKERS", str(args.workers)]
    counts = {"batches": args.batches, "repeats": args.repeats, "iterations": args.iterations}
    table = compare_pipelines(args.config_file, args.pipelines, opts, **counts)
    print(f"\n{args.workers} loader processes, {args.repeats} rounds, medians\n\n{table}")
    return 0
