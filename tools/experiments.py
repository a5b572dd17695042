#!/usr/bin/env python
r"""Run experiments, each once, and collect their results in one CSV file.

An experiment is a dataset, a config, options and a seed. Those in the results file are not
repeated; interrupted ones resume from their last checkpoint. Sparse detectors are evaluated twice,
without and with NMS, since variants have to be compared at equal post-processing. A dataset is
a folder with ``images/{train,val}`` and ``annotations/instances_{train,val}.json``, or ``shapes``.

    python tools/experiments.py --data DATA --sets bccd aquarium \
        --configs small/sparse_rcnn_R18_50pro --seeds 1 2 3
    python tools/experiments.py --table            # mean and standard deviation over seeds
    python tools/experiments.py --plot results.png # the same as a chart
"""

import argparse
import csv
import itertools
import json
import platform
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import dsrcnn  # before detectron2

# isort: split
import torch
from draw_results import draw_results
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dsrcnn.config.validate import architecture_of
from dsrcnn.engine.main import evaluate
from dsrcnn.evaluation.coco import coco_ground_truth
from dsrcnn.modeling.meta_arch.base import SparseDetector
from dsrcnn.visualization.curves import read_metrics

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP90"]
SYNTHETIC = "shapes"  # needs no folder and no options: configs of quick/ name it
MEASURED = [*METRICS, "duplicates", "s_per_it"]
FIELDS = ["set", "config", "opts", "seed", "nms", *MEASURED, "iterations", "minutes", "machine"]
FIELDS += ["torch", "revision"]


def read_results(path: Path) -> list[dict[str, str]]:
    """Read all rows, none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def data_options(folder: Path) -> list[str]:
    """Return the overrides that make a folder the dataset of a run."""
    if folder.name == SYNTHETIC:
        return []
    custom = {
        "NAME": folder.name,
        "TRAIN_JSON": folder / "annotations/instances_train.json",
        "TRAIN_IMAGES": folder / "images/train",
        "TEST_JSON": folder / "annotations/instances_val.json",
        "TEST_IMAGES": folder / "images/val",
    }
    return [str(x) for k, v in custom.items() for x in (f"DATASETS.CUSTOM.{k}", v)]


def machine() -> str:
    """Describe the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def revision() -> str:
    """Return the short hash of the commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run(data: Path, name: str, config: str, seed: int, opts: list[str]) -> list[dict[str, object]]:
    """Train one experiment, evaluate it without and with NMS, and return its rows."""
    variant = "_".join(opts).replace("/", "-") if opts else "plain"
    if len(variant) > 100:  # file systems limit names
        variant = f"{variant[:90]}_{zlib.crc32(variant.encode()):08x}"
    output = ROOT / "output/experiments" / name / config / variant / f"seed{seed}"
    command = [sys.executable, "train_net.py", "--config-file", config, "--resume"]
    options = [*data_options(data / name), "SEED", str(seed), "OUTPUT_DIR", str(output), *opts]
    start = time.perf_counter()
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - start) / 60
    entries = read_metrics(output / "metrics.json")
    common = {
        **{"set": name, "config": config, "seed": seed, "opts": " ".join(opts)},
        "s_per_it": f"{median(e['time'] for e in entries if 'time' in e):.3f}",
        "iterations": entries[-1]["iteration"],
        "minutes": f"{minutes:.1f}",
        "machine": machine(),
        "torch": torch.__version__,
        "revision": revision(),
    }
    architecture = architecture_of(dsrcnn.load_cfg(output / "config.yaml"))
    settings = ("off", "on") if issubclass(architecture, SparseDetector) else ("on",)
    return [{**common, **measure(output, data / name, nms)} for nms in settings]


def measure(output: Path, data: Path, nms: str) -> dict[str, object]:
    """Evaluate the trained model of a run with NMS "off" or "on"."""
    folder = output / f"nms_{nms}"
    opts = ["MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", folder]
    opts += ["MODEL.SparseRCNN.NMS.ENABLED", nms == "on"]
    box = evaluate(dsrcnn.load_cfg(output / "config.yaml", list(map(str, opts))))["bbox"]
    detections = json.loads((folder / "inference/coco_instances_results.json").read_text())
    if data.name == SYNTHETIC:
        truth = coco_ground_truth("shapes_val")
    else:
        truth = json.loads((data / "annotations/instances_val.json").read_text())
    duplicates = duplicates_per_object(detections, truth["annotations"])
    metrics = {m: f"{box[m]:.2f}" for m in METRICS}
    return {"nms": nms, **metrics, "duplicates": f"{duplicates:.2f}"}


def duplicates_per_object(
    detections: Iterable[dict[str, Any]], annotations: Iterable[dict[str, Any]]
) -> float:
    """Mean number of detections of an object beyond the first; 0 without objects.

    A detection belongs to the object of its class and image with the largest IoU, if that is at
    least 0.5. Detections with a score below 0.3 and crowds do not count.

    Args:
        detections: COCO results: ``image_id``, ``category_id``, ``bbox`` (XYWH) and ``score``.
        annotations: COCO annotations.
    """
    objects = _boxes_by_class(a for a in annotations if not a.get("iscrowd"))
    detected = _boxes_by_class(d for d in detections if d["score"] >= 0.3)
    duplicates = 0
    for key in objects.keys() & detected.keys():
        overlap, nearest = box_iou(detected[key], objects[key]).max(dim=1)
        counts = nearest[overlap >= 0.5].bincount(minlength=len(objects[key]))
        duplicates += int((counts - 1).clamp(min=0).sum())
    return duplicates / max(1, sum(map(len, objects.values())))


def _boxes_by_class(entries: Iterable[dict[str, Any]]) -> dict[tuple[Any, Any], Tensor]:
    """Boxes (N, 4) xyxy by image and category."""
    grouped: dict[tuple[Any, Any], list[list[float]]] = defaultdict(list)
    for entry in entries:
        grouped[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    return {
        key: box_convert(torch.tensor(boxes, dtype=torch.float64), "xywh", "xyxy")
        for key, boxes in grouped.items()
    }


def table(rows: list[dict[str, str]]) -> str:
    """Format mean and standard deviation over seeds as Markdown, a line per variant."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["set"], f"{row['config']} {row['opts']}".strip(), row["nms"]].append(row)
    headers = ["data", "config", "NMS", "seeds", *MEASURED, "minutes"]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for key, members in groups.items():
        seeds = ", ".join(sorted(m["seed"] for m in members))
        cells = [
            _mean_and_deviation([float(m[k] or "nan") for m in members], k) for k in headers[4:]
        ]
        lines.append("| " + " | ".join([*key, seeds, *cells]) + " |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float], name: str) -> str:
    if any(value != value for value in values):  # not measured
        return ""
    digits = {"s_per_it": 2, "duplicates": 2}.get(name, 1)
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Run the experiments that have no results yet and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the datasets")
    parser.add_argument("--sets", nargs="+", default=[])
    parser.add_argument("--configs", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE ... for every run")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results.csv")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="only draw the results into this file")
    args = parser.parse_args()
    if args.plot:
        draw_results(read_results(args.results), args.plot)
        return
    if not args.table and not args.data:
        parser.error("write --data, the folder of the datasets")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    experiments = itertools.product(args.seeds, args.sets, args.configs)
    for seed, name, config in [] if args.table else experiments:
        rows = read_results(args.results)
        key = (name, config, str(seed), " ".join(args.opts))
        if any((r["set"], r["config"], r["seed"], r["opts"]) == key for r in rows):
            continue
        print(f"{name} {config} seed {seed} ...", flush=True)
        new = run(args.data.resolve(), name, config, seed, args.opts)
        is_new = not args.results.is_file()
        with args.results.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(new)
    print(table(read_results(args.results)))


if __name__ == "__main__":
    main()
