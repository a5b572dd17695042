"""Time DLA's matcher, all stages and images in one call, against a loop over them."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    for name, value in {"stages": 6, "images": 2, "proposals": 300, "objects": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from benchmarks.matching import compare_matchers

    print(
        compare_matchers(
            stages=args.stages,
            images=args.images,
            proposals=args.proposals,
            objects=args.objects,
            repeats=args.repeats,
        )
    )
    return 0
