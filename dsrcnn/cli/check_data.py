"""``dsrcnn check-data``: faults of a dataset, and its statistics."""

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tabulate import tabulate

from ..config import add_dsrcnn_config, load_cfg, read_cfg
from ..data.build import build_train_loader
from ..data.datasets import inspection
from ..data.datasets.coco import load_checked_coco_json, read_categories, read_coco_records
from ..data.datasets.custom import find_split, folder_splits, load_split, read_folder, split_fault
from ..data.datasets.inspection import FAULTS, NOTES, SIZES, SplitReport
from ..engine.setup import check_datasets, resolve_solver
from ..errors import ConfigError, DataError
from .options import positive_int

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s [FOLDER] [options] [KEY VALUE ...]"
    text = "in COCO, Pascal VOC or YOLO layout (default: DATASETS.CUSTOM.FOLDER)"
    parser.add_argument("folder", nargs="?", type=Path, help=text)
    text = "config of the training, a YAML file or a shipped name, which KEY VALUE pairs change"
    parser.add_argument("--config-file", metavar="FILE", help=text)
    parser.add_argument("--splits", nargs="+", help="splits to check (default: all)")
    text = "also draw a sheet of images to this file"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    size: dict[str, Any] = {"type": positive_int, "metavar": "PIXELS"}
    text = "shorter side in training (default: median of INPUT.MIN_SIZE_TRAIN; 800 without config)"
    parser.add_argument("--min-size", **size, help=text)
    text = "limit of the longer side (default: INPUT.MAX_SIZE_TRAIN; 1333 without config)"
    parser.add_argument("--max-size", **size, help=text)
    text = "examples per kind of fault (default: 3)"
    parser.add_argument("--examples", type=positive_int, default=3, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Print statistics and faults; returns 1 if something should be fixed."""
    if args.output and args.output.suffix.lower() not in _EXTENSIONS:
        raise ConfigError(
            f"--output is {args.output}; write a file that ends in one of {', '.join(_EXTENSIONS)}."
        )
    cfg = _read_config(args)
    node = cfg.DATASETS.CUSTOM
    files = {part: pair for part, pair in _json_files(node).items() if pair[0]}
    absent: list[str] = []
    if args.splits and not node.FOLDER:
        raise ConfigError(
            f"--splits is {' '.join(args.splits)}, but the config names json files and no folder "
            "of splits. Leave --splits out."
        )
    if node.FOLDER:
        train, tests, absent = _used_splits(Path(node.FOLDER), node, args.splits)
    else:
        train, tests = (
            (["train"] if "train" in files else []),
            (["test"] if "test" in files else []),
        )
    min_size, max_size = _training_size(cfg)
    sizes = {"min_size": args.min_size or min_size, "max_size": args.max_size or max_size}
    reports, samples = [], []
    for split in (*train, *tests):
        errors: list[tuple[str, str]] = []
        on_error = partial(_collect, errors)
        if node.FOLDER:
            classes, records = read_folder(Path(node.FOLDER), split, on_error)
        else:
            classes = list(read_categories(files[split][0]).values())
            records = read_coco_records(*files[split], on_error)
        trains = split in train
        masks = trains and cfg.MODEL.MASK_ON
        report = inspection.inspect_records(
            split, classes, records, errors, **sizes, for_training=trains, needs_masks=masks
        )
        reports.append(report)
        samples += [(record, classes) for record in records]
    inspection.compare_splits(reports)
    print(_tables(reports))
    _print_cases(reports, args.examples)
    for text in absent:
        print(f"warning: {text} This split is left out.")
    if args.output:
        from ..analysis.dataset import draw_sheet

        draw_sheet(samples, args.output)
        print(f"pictures: {args.output}")
    if any(report.has_faults for report in reports):
        print("\nSome faults should be fixed.")
        return 1
    for report in reports:  # the rules of training have the last word
        labeled = report.name in train
        if node.FOLDER:
            load_split(Path(node.FOLDER), report.name, list(report.classes), labeled=labeled)
        else:
            load_checked_coco_json(*files[report.name], labeled=labeled)
    if args.config_file:
        cfg = load_cfg(args.config_file, args.opts)
        if train:
            _check_training(cfg)
    print(f"\n{_verdict(node, train)}")
    return 0


def _check_training(cfg: CfgNode) -> None:
    """Let the checks of a training refuse what they refuse at its start."""
    check_datasets(cfg, eval_only=False)
    build_train_loader(resolve_solver(cfg))


def _collect(errors: list[tuple[str, str]], fault: str, message: str) -> None:
    errors.append((fault, message))


def _read_config(args: argparse.Namespace) -> CfgNode:
    """Return the config with the folder to check, and complete the overrides."""
    if args.opts and not args.config_file:
        raise ConfigError(f"{' '.join(args.opts)} changes a config; write --config-file, too.")
    if args.folder:
        args.opts = [*args.opts, "DATASETS.CUSTOM.FOLDER", str(args.folder)]
    if args.config_file:
        cfg = read_cfg(args.config_file, args.opts)
    else:
        cfg = add_dsrcnn_config(get_cfg())
        cfg.DATASETS.CUSTOM.FOLDER = str(args.folder or "")
    node = cfg.DATASETS.CUSTOM
    if node.FOLDER and any(file for file, _ in _json_files(node).values()):
        raise ConfigError("DATASETS.CUSTOM has a FOLDER and json files; write one or the other.")
    if not node.FOLDER and not any(file for file, _ in _json_files(node).values()):
        raise ConfigError("write the folder to check, or a config with DATASETS.CUSTOM.FOLDER.")
    return cfg


def _json_files(node: CfgNode) -> dict[str, tuple[str, str]]:
    """Return json file and image folder of each part, empty without."""
    test = (node.TEST_JSON, node.TEST_IMAGES)
    return {"train": (node.TRAIN_JSON, node.TRAIN_IMAGES), "test": test}


def _used_splits(
    folder: Path, node: CfgNode, chosen: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Return splits to train on, splits to test on, and warnings of splits that are absent.

    Raises:
        DataError: if a split that was chosen, or is trained on, is absent.
    """
    known, used = set(folder_splits(folder)), [node.TRAIN_SPLIT, node.TEST_SPLIT]
    # VOC's union of two splits is no split of its own.
    union = {"trainval"} - set(used) if {"train", "val"} <= known else set()
    train = find_split(folder, node.TRAIN_SPLIT) if node.TRAIN_SPLIT and not chosen else None
    splits = [find_split(folder, split) for split in chosen or sorted(known - union)]
    needed = splits if chosen else [find_split(folder, s) for s in used if _has(folder, s)]
    faults = {split: split_fault(folder, split) for split in splits}
    for fault in filter(None, (faults[split] for split in needed)):
        raise DataError(fault)
    present = [split for split in faults if not faults[split]]
    if chosen and node.TRAIN_SPLIT and _has(folder, node.TRAIN_SPLIT):
        train = find_split(folder, node.TRAIN_SPLIT)
    tests = [split for split in present if split != train]
    absent = [fault for fault in faults.values() if fault]
    return [split for split in present if split == train], tests, absent


def _has(folder: Path, split: str) -> bool:
    try:
        find_split(folder, split)
    except DataError:
        return False
    return True


def _training_size(cfg: CfgNode) -> tuple[float, float]:
    """Return shorter side and limit of the longer side of training images, in pixels."""
    side = cfg.INPUT.AUG.SCALE_JITTER.SIZE
    if side:
        return math.inf, side
    return statistics.median(cfg.INPUT.MIN_SIZE_TRAIN or (0,)), cfg.INPUT.MAX_SIZE_TRAIN


def _verdict(node: CfgNode, train: Sequence[str]) -> str:
    """Say what the data can be used for."""
    if not train:
        return "No faults. The split to train on was not checked."
    if node.FOLDER and node.TEST_SPLIT and not _has(Path(node.FOLDER), node.TEST_SPLIT):
        text = f"since there is no split {node.TEST_SPLIT!r}."
        return f"Ready to train with DATASETS.CUSTOM.TEST_SPLIT '', {text}"
    return "Ready to train."


def _print_cases(reports: Sequence[SplitReport], examples: int) -> None:
    for kind in (*FAULTS, *NOTES):
        for report in reports:
            issues = report.issues.get(kind, [])
            for text in issues[:examples]:
                print(f"{report.name}, {kind}: {text}")
            if len(issues) > examples:
                print(f"{report.name}, {kind}: and {len(issues) - examples} more")


def _tables(reports: Sequence[SplitReport]) -> str:
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
    return "\n\n".join(
        tabulate(rows, [title, *splits], disable_numparse=[0]) for title, rows in tables.items()
    )


def _box_count(report: SplitReport, name: str) -> int | str:
    classes = list(report.classes)
    return report.boxes[classes.index(name)] if name in classes else "-"
