"""``dsrcnn analyze``: what a model costs, by part."""

import argparse
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from ..analysis.complexity import Complexity, PartCost, default_size, load_bare_cfg, measure
from ..engine.setup import device_name
from .options import add_model_arguments, find_model, positive_int

_COLUMNS = (
    *("part", "parameters", "trainable", "multiply-adds (G)", "kept for backward (MiB)"),
    "inference (ms)",
)
_LEGEND = (
    "multiply-adds: of one image in inference; convolutions, matrix products and attention, by the "
    "formulas of torch.utils.flop_counter",
    "kept for backward: by autograd in a training forward pass of the batch, without parameters",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_arguments(parser, weights=False)
    size: dict[str, Any] = {"type": positive_int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    text = "of the images in pixels (default: INPUT.MIN_SIZE_TEST INPUT.MAX_SIZE_TEST)"
    parser.add_argument("--size", help=text, **size)
    number: dict[str, Any] = {"type": positive_int, "metavar": "N"}
    text = "images at once, for memory and seconds (default: 1)"
    parser.add_argument("--images", default=1, help=text, **number)
    text = "times to measure seconds; medians are printed (default: 3)"
    parser.add_argument("--repeats", default=3, help=text, **number)


def run(args: argparse.Namespace) -> int:
    """Measure the model with random weights on random images, and print a table."""
    cfg, notes = load_bare_cfg(*find_model(args, weights=False))
    height, width = args.size or default_size(cfg)
    costs = measure(cfg, (height, width), images=args.images, repeats=args.repeats)
    batch = f"{args.images} image{'s' if args.images > 1 else ''} of {height} x {width} pixels"
    print(f"{cfg.MODEL.META_ARCHITECTURE}, random weights, {batch}, {device_name(cfg)}\n")
    print(format_costs(costs))
    print(f"\ntraining step: {1000 * costs.training_seconds:.1f} ms, update included")
    print("\n".join((*_LEGEND, *(f"note: {note}" for note in notes))))
    return 0


def format_costs(costs: Complexity) -> str:
    """Make a table of parts that cost anything, and of their total."""
    rows = [_row(name, cost) for name, cost in costs.parts.items() if any(cost)]
    return tabulate(
        [*rows, _row("total", costs.total)],
        _COLUMNS,
        disable_numparse=True,
        colalign=("left", *["right"] * (len(_COLUMNS) - 1)),
    )


def _row(name: str, cost: PartCost) -> Sequence[str]:
    return (
        *(name, f"{cost.parameters:,}", f"{cost.trainable:,}"),
        *(f"{cost.multiply_adds / 1e9:.3f}", f"{cost.saved_bytes / 2**20:.1f}"),
        f"{1000 * cost.seconds:.1f}",
    )
