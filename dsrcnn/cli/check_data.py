"""Look at a data set before training: broken files and boxes, doubles, class balance, sizes."""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import at_least_one

__all__ = ["add_arguments", "run"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, help="in the layout of COCO, Pascal VOC or YOLO")
    parser.add_argument("--splits", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path, help="also write a sheet of pictures here (.png)")
    size: dict[str, Any] = {"type": at_least_one, "metavar": "PIXELS"}
    parser.add_argument("--min-size", default=800, **size, help="INPUT.MIN_SIZE_TRAIN (800)")
    parser.add_argument("--max-size", default=1333, **size, help="INPUT.MAX_SIZE_TRAIN (1333)")
    shown = "how many of each kind are named (default: 3)"
    parser.add_argument("--examples", type=at_least_one, default=3, help=shown)


def run(args: argparse.Namespace) -> int:
    """Print what was found; status 1 if something should be mended."""
    from ..data.datasets.custom import read_folder
    from ..data.datasets.validate import FAULTS, NOTES, compare_splits, inspect_records

    if args.output and args.output.suffix.lower() not in _PICTURES:
        raise ConfigError(
            f"--output is {args.output}; write a file that ends in one of {', '.join(_PICTURES)}."
        )
    reports, everything = [], []
    for split in args.splits or _all_splits(args.folder):
        unread: list[tuple[str, str]] = []
        note = lambda kind, text, unread=unread: unread.append((kind, text))  # noqa: E731
        classes, records = read_folder(args.folder, split, note)
        sizes = {"min_size": args.min_size, "max_size": args.max_size}
        reports.append(inspect_records(split, classes, records, unread, **sizes))
        everything += [(record, classes) for record in records]
    compare_splits(reports)
    print(_tables(reports))
    for kind in (*FAULTS, *NOTES):
        for report in reports:
            found = report.found.get(kind, [])
            for text in found[: args.examples]:
                print(f"{report.name}, {kind}: {text}")
            if len(found) > args.examples:
                print(f"{report.name}, {kind}: and {len(found) - args.examples} more")
    if args.output:
        from ..analysis.dataset import draw_sheet

        draw_sheet(everything, args.output)
        print(f"pictures: {args.output}")
    faulty = any(report.has_faults for report in reports)
    print("\nSomething should be mended." if faulty else "\nReady to train.")
    return int(faulty)


def _all_splits(folder: Path) -> list[str]:
    """Splits of a folder, without VOC's union of two others."""
    from ..data.datasets.custom import folder_splits

    splits = folder_splits(folder)
    return [s for s in splits if s != "trainval" or not {"train", "val"} <= set(splits)]


def _tables(reports: list[Any]) -> str:
    from tabulate import tabulate

    from ..data.datasets.validate import FAULTS, NOTES, SIZES

    names = [report.name for report in reports]
    counts = [["images", *(r.images for r in reports)]]
    counts += [["boxes to learn", *(r.boxes.total() for r in reports)]]
    counts += [[kind, *(len(r.found.get(kind, [])) for r in reports)] for kind in (*FAULTS, *NOTES)]
    known = dict.fromkeys(name for report in reports for name in report.classes)
    classes = [[name, *(_boxes_of(report, name) for report in reports)] for name in known]
    limits = [0, *SIZES, None]
    ranges = [f"{a} to {b}" if b else f"{a} and more" for a, b in pairwise(limits)]
    sizes = [[text, *(r.sizes[place] for r in reports)] for place, text in enumerate(ranges)]
    return "\n\n".join(
        tabulate(rows, [title, *names], tablefmt="simple")
        for title, rows in (
            ("", counts),
            ("boxes by class", classes),
            ("side when trained on", sizes),
        )
    )


def _boxes_of(report: Any, name: str) -> int | str:
    """Boxes of a class in a split, which may not have the class."""
    classes = list(report.classes)
    return report.boxes[classes.index(name)] if name in classes else "-"
