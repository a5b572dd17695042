"""Draw losses, AP and what else a training has logged, from its metrics.json."""

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run_folder", type=Path, metavar="run", help="output folder of a training")
    parser.add_argument("--output", type=Path, help="picture (default: curves.png in the folder)")


def run(args: argparse.Namespace) -> int:
    """Write the picture and print where it is."""
    from ..errors import DataError
    from ..visualization import draw_curves

    metrics = args.run_folder / "metrics.json"
    if not metrics.is_file():
        raise DataError(f"{metrics} does not exist; write the output folder of a training.")
    output = args.output or args.run_folder / "curves.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(metrics, output)
    print(output)
    return 0
