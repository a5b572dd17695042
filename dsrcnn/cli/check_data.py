"""``dsrcnn check-data``: faults of a dataset, and its statistics."""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..data.datasets import validate
from ..data.datasets.custom import folder_splits, read_folder
from ..data.datasets.validate import FAULTS, NOTES, SIZES, SplitReport
from ..errors import ConfigError
from .options import positive_int

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, help="in COCO, Pascal VOC or YOLO layout")
    parser.add_argument("--splits", nargs="+", help="splits to check (default: all)")
    text = "also draw a sheet of images to this file"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    size: dict[str, Any] = {"type": positive_int, "metavar": "PIXELS"}
    parser.add_argument("--min-size", default=800, **size, help="INPUT.MIN_SIZE_TRAIN (800)")
    parser.add_argument("--max-size", default=1333, **size, help="INPUT.MAX_SIZE_TRAIN (1333)")
    text = "examples per kind of fault (default: 3)"
    parser.add_argument("--examples", type=positive_int, default=3, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Print statistics and faults; returns 1 if something should be fixed."""
    if args.output and args.output.suffix.lower() not in _EXTENSIONS:
        raise ConfigError(
            f"--output is {args.output}; write a file that ends in one of {', '.join(_EXTENSIONS)}."
        )
    reports, samples = [], []
    for split in args.splits or _all_splits(args.folder):
        errors: list[tuple[str, str]] = []
        classes, records = read_folder(args.folder, split, lambda *e, to=errors: to.append(e))
        sizes = {"min_size": args.min_size, "max_size": args.max_size}
        reports.append(validate.inspect_records(split, classes, records, errors, **sizes))
        samples += [(record, classes) for record in records]
    validate.compare_splits(reports)
    print(_tables(reports))
    for kind in (*FAULTS, *NOTES):
        for report in reports:
            issues = report.issues.get(kind, [])
            for text in issues[: args.examples]:
                print(f"{report.name}, {kind}: {text}")
            if len(issues) > args.examples:
                print(f"{report.name}, {kind}: and {len(issues) - args.examples} more")
    if args.output:
        from ..analysis.dataset import draw_sheet

        draw_sheet(samples, args.output)
        print(f"pictures: {args.output}")
    has_faults = any(report.has_faults for report in reports)
    print("\nSome faults should be fixed." if has_faults else "\nReady to train.")
    return int(has_faults)


def _all_splits(folder: Path) -> list[str]:
    """Return the splits of a folder, without VOC's union of two splits."""
    splits = folder_splits(folder)
    return [s for s in splits if s != "trainval" or not {"train", "val"} <= set(splits)]


def _tables(reports: list[SplitReport]) -> str:
    kinds = (*FAULTS, *NOTES)
    counts: list[list[Any]] = [["images", *(r.images for r in reports)]]
    counts += [["usable boxes", *(sum(r.boxes.values()) for r in reports)]]
    counts += [[kind, *(len(r.issues.get(kind, [])) for r in reports)] for kind in kinds]
    names = dict.fromkeys(name for report in reports for name in report.classes)
    classes = [[name, *(_box_count(report, name) for report in reports)] for name in names]
    ranges = [f"{a} to {b}" if b else f"{a} and more" for a, b in pairwise([0, *SIZES, None])]
    sizes = [[text, *(r.sizes[index] for r in reports)] for index, text in enumerate(ranges)]
    tables = {"": counts, "boxes by class": classes, "side at the training size": sizes}
    splits = [report.name for report in reports]
    return "\n\n".join(tabulate(rows, [title, *splits]) for title, rows in tables.items())


def _box_count(report: SplitReport, name: str) -> int | str:
    classes = list(report.classes)
    return report.boxes[classes.index(name)] if name in classes else "-"
