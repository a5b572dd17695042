"""Speed, launches and memory of inference and training, ours beside the official code.

One process each, in turn; writes a CSV file and a picture.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.speed import Measurement, Variant, add_config_arguments, compare, median_ratio
from benchmarks.training import OPTIONS
from benchmarks.worker import OPTIMIZATIONS, Shape, add_shape_arguments, at_least_one

_WHOLE = {"inference": "inference", "train": "step"}
_GRAPH = ("TEST.CUDA_GRAPH", "True")
_COUNTS = ("operators", "conversions", "launches", "copies", "waits", "products alone")
_NAMES = ["ours", "plain", "official", "bf16", "compile", "cuda-graph", "dla", "dpg", "dla-dpg"]


class Row(NamedTuple):
    """Medians of a variant in one case.

    Attributes:
        mode: inference or train.
        images: batch size.
        variant: its name.
        milliseconds: of a whole inference or training step.
        factor: how many times as long it takes as the first variant, by neighboring rounds.
        parts: milliseconds by part, counts, and MiB.
    """

    mode: str
    images: int
    variant: str
    milliseconds: float
    factor: float
    parts: dict[str, float]


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Return the variants to measure, the first of them ours."""
    config, opts = args.config_file, tuple(args.set)
    variants = [Variant("ours", config, opts)]
    for name in args.variants:
        if name == "plain":
            variants.append(Variant(name, config, opts, None, [*OPTIMIZATIONS, "optimizer"]))
        elif name == "cuda-graph":
            variants.append(Variant(name, config, (*opts, *_GRAPH)))
        elif name not in ("ours", "official"):
            variants.append(Variant(name, config, (*opts, *OPTIONS[name])))
    if args.official:
        official = Variant("official", config, opts, None, ["optimizer"], args.official)
        variants.insert(1, official)
    return variants


def rows_of_case(measured: Sequence[Measurement], mode: str, images: int) -> list[Row]:
    """Turn measurements into rows."""
    whole = _WHOLE[mode]
    seconds = [[r[whole] for r in m.rounds] for m in measured]
    rows = []
    for m, own in zip(measured, seconds, strict=True):
        parts = {
            part: m.median(part) * (1 if part in _COUNTS[:-1] or "MiB" in part else 1000)
            for part in m.rounds[0]
            if part != whole
        }
        factor = median_ratio(own, seconds[0])
        rows.append(Row(mode, images, m.variant.name, m.median(whole) * 1000, factor, parts))
    return rows


def write_csv(rows: Sequence[Row], path: Path, **columns: object) -> None:
    """Write all rows, with further columns that are equal for all of them."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    fields = [*columns, "mode", "images", "variant", "ms", "factor", *parts]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {"ms": row.milliseconds, "factor": row.factor, **row.parts}
            rounded = {key: f"{value:.6g}" for key, value in numbers.items()}
            names = {"mode": row.mode, "images": row.images, "variant": row.variant}
            writer.writerow({**columns, **names, **rounded})


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw milliseconds an image as bars, a panel for every mode, factors above the bars."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure = Figure(figsize=(1.5 + 4.5 * len(modes), 4.2), layout="constrained")
    figure.suptitle(title)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        of_mode = [row for row in rows if row.mode == mode]
        names = list(dict.fromkeys(row.variant for row in of_mode))
        batches = list(dict.fromkeys(row.images for row in of_mode))
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            bars = [row for row in of_mode if row.variant == name]
            places = [batches.index(row.images) + (index + 0.5) * width - 0.4 for row in bars]
            drawn = axes.bar(
                places, [row.milliseconds / row.images for row in bars], width, label=name
            )
            axes.bar_label(drawn, [f"{row.factor:.2f}" for row in bars], fontsize=8)
        axes.set_xticks(range(len(batches)), [str(count) for count in batches])
        axes.set(title=mode, xlabel="images in a batch", ylabel="ms an image")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser, "coco/sparse_rcnn_R50_100pro_3x")
    add_shape_arguments(parser)
    parser.add_argument(
        "--official",
        metavar="FOLDER",
        help="official Sparse R-CNN: projects/SparseRCNN of a clone of its repository",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=_NAMES,
        default=["plain"],
        help="beside ours; plain: the same computed the common way (default: plain)",
    )
    parser.add_argument("--batches", type=at_least_one, nargs="+", default=[1, 2, 8], metavar="N")
    parser.add_argument("--train-batches", type=int, nargs="*", default=[2], metavar="N")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), metavar="FOLDER")


def run(args: argparse.Namespace) -> None:
    """Measure every case, and write table and picture after each."""
    args.output.mkdir(parents=True, exist_ok=True)
    threads = args.threads or torch.get_num_threads()
    cases = [("inference", n) for n in args.batches] + [("train", n) for n in args.train_batches]
    rows: list[Row] = []
    for mode, images in cases:
        variants = variants_of(args)
        if mode == "train":
            variants = [v for v in variants if v.name != "cuda-graph"]
        shape = Shape.from_args(args)._replace(images=images)
        options = {"shape": shape, "threads": args.threads}
        measured = compare(variants, mode=mode, repeats=args.repeats, **options)
        if mode == "inference":  # in processes of their own: counting takes memory
            counts = compare(variants, mode="count", repeats=1, **options)
            for m, counted in zip(measured, counts, strict=True):
                extra = {k: v for k, v in counted.rounds[0].items() if k in _COUNTS}
                m.rounds[:] = [{**r, **extra} for r in m.rounds]
        rows += rows_of_case(measured, mode, images)
        size = f"{shape.height}x{shape.width}"
        versions = {"torch": torch.__version__, "config": args.config_file, "size": size}
        device = measured[0].device
        columns = {"device": device, "threads": threads, **versions}
        write_csv(rows, args.output / "speed.csv", **columns)
        title = f"{Path(args.config_file).stem}, {size}, {device}; factors: time over ours"
        draw(rows, args.output / "speed.png", title)
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    table = [
        [r.mode, r.images, r.variant, r.milliseconds, r.factor, *(r.parts.get(p) for p in parts)]
        for r in rows
    ]
    headers = ["", "images", "variant", "ms", "factor", *parts]
    print(tabulate(table, headers, floatfmt=".4g", tablefmt="pipe"))
    print(f"\n{args.output / 'speed.csv'}, {args.output / 'speed.png'}")
