"""Time and memory of training iterations by option, and the speed of the loader."""

import argparse
from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.loader import images_per_second
from benchmarks.speed import (
    Measurement,
    Variant,
    add_config_arguments,
    compare,
    median_ratio,
)
from benchmarks.worker import Shape, add_shape_arguments, at_least_one

_AMP = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION")
_DLA = ("MODEL.SparseRCNN.DLA.ENABLED", "True")
_DPG = ("MODEL.SparseRCNN.DPG.ENABLED", "True")
_SQR = ("MODEL.SparseRCNN.SQR.ENABLED", "True", "MODEL.SparseRCNN.SQR.START")
_DENSE = ("MODEL.SparseRCNN.PROPOSALS.NAME", "DenseDistinct", "MODEL.SparseRCNN.NUM_HEADS", "2")
_FROM_P3 = (
    *("MODEL.FPN.IN_FEATURES", "['res3','res4','res5']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p3','p4','p5']"),
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16": (*_AMP, "bf16"),
    "fp16": (*_AMP, "fp16"),
    "accumulate": ("SOLVER.ACCUMULATE", "2"),
    "checkpoint": ("MODEL.ACTIVATION_CHECKPOINT", "('backbone', 'stages')"),
    "compile": ("MODEL.COMPILE", "True"),
    "dla": _DLA,
    "dpg": _DPG,
    "dla-dpg": (*_DLA, *_DPG),
    "sqr3": (*_SQR, "3"),
    "sqr1": (*_SQR, "1"),
    "dla-sqr3": (*_DLA, *_SQR, "3"),
    "dla-sqr1": (*_DLA, *_SQR, "1"),
    "dense": _DENSE,
    "dense-p3": (*_DENSE, *_FROM_P3),
    "dense-dla": (*_DENSE, *_DLA),
    "shared": ("MODEL.SparseRCNN.SHARE_STAGES", "True"),
}


def format_options(measured: Sequence[Measurement]) -> str:
    """Seconds and peak memory; ratios to the first, medians over rounds paired in time."""
    seconds = [[r["iteration"] for r in m.rounds] for m in measured]
    memory = [m.median("peak memory (MiB)") for m in measured]
    rows = [
        [
            m.variant.name,
            m.median("iteration"),
            median_ratio(seconds[i], seconds[0]),
            memory[i],
            memory[i] / memory[0],
        ]
        for i, m in enumerate(measured)
    ]
    headers = ["", "s / iteration", "ratio", "peak memory (MiB)", "ratio"]
    return tabulate(rows, headers, floatfmt=("", ".3f", ".2f", ".0f", ".2f"), tablefmt="pipe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser)
    add_shape_arguments(parser)
    parser.add_argument(
        "--options",
        nargs="+",
        choices=OPTIONS,
        metavar="NAME",
        default=["float32", "bf16", "accumulate", "checkpoint", "compile"],
        help=f"of {', '.join(OPTIONS)}; accumulate: 2 parts, checkpoint: backbone and stages, "
        "dense: distinct proposals, two stages, p3: no level of stride 4, "
        "shared: one stage for all; ratios are to the first",
    )
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument(
        "--loader", action="store_true", help="also time the loader on the config's training data"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table: whole iterations of the training loop, one process per option."""
    shape = Shape.from_args(args)
    variants = [Variant(n, args.config_file, (*args.set, *OPTIONS[n])) for n in args.options]
    measured = compare(
        variants, mode="loop", shape=shape, repeats=args.repeats, threads=args.threads
    )
    print(f"\n{shape}, {args.repeats} rounds, medians\n\n{format_options(measured)}")
    if args.loader:
        speed = images_per_second(args.config_file, args.set)
        fastest = max(args.images / m.median("iteration") for m in measured)
        print(f"\nloader: {speed:.1f} images/s; the fastest of the above takes {fastest:.1f}")
