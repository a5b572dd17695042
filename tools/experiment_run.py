#!/usr/bin/env python
"""Train and measure one experiment; ``tools/experiments.py`` starts these as processes.

Interrupted training resumes from its last checkpoint. Sparse detectors are evaluated twice, without
and with NMS, since variants have to be compared at equal post-processing.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import dsrcnn  # before detectron2

# isort: split
import torch
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


class Experiment(NamedTuple):
    """Names of the parts of a run.

    Attributes:
        set: folder of the dataset below that of all datasets, or ``shapes``.
        config: shipped config or file.
        seed: ``SEED``.
        opts: further overrides, ``KEY VALUE ...``.
    """

    set: str
    config: str
    seed: int
    opts: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Join the parts as in a file of experiments."""
        return " ".join([self.set, self.config, str(self.seed), *self.opts])

    @property
    def overrides(self) -> str:
        """Overrides in a row of results, without spaces in values: ``A.B (1,2)``."""
        return " ".join("".join(word.split()) for word in self.opts)

    @property
    def folder(self) -> Path:
        """Output folder of the training run."""
        variant = "_".join(self.opts).replace("/", "-") if self.opts else "plain"
        if len(variant) > 100:  # file systems limit names
            variant = f"{variant[:90]}_{zlib.crc32(variant.encode()):08x}"
        config = Path(self.config)
        name = config.relative_to(config.anchor).with_suffix("") if config.suffix else config
        return ROOT / "output/experiments" / self.set / name / variant / f"seed{self.seed}"


def run(experiment: Experiment, data: Path) -> list[dict[str, object]]:
    """Train, evaluate without and with NMS, and return a row for each.

    The minutes are those of the iterations, without the start and evaluations, so that they do not
    depend on interruptions.
    """
    output = experiment.folder
    command = [sys.executable, "train_net.py", "--config-file", experiment.config, "--resume"]
    options = [*data_options(data / experiment.set), "SEED", str(experiment.seed)]
    options += ["OUTPUT_DIR", str(output), *experiment.opts]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    entries = read_metrics(output / "metrics.json")
    seconds = median(e["time"] for e in entries if "time" in e)
    iterations = int(entries[-1]["iteration"])
    common = {
        **{"set": experiment.set, "config": experiment.config, "seed": experiment.seed},
        "opts": experiment.overrides,
        "s_per_it": f"{seconds:.3f}",
        "iterations": iterations,
        "minutes": f"{seconds * iterations / 60:.1f}",
        "machine": machine(),
        "torch": torch.__version__,
        "revision": revision(),
    }
    architecture = architecture_of(dsrcnn.load_cfg(output / "config.yaml"))
    settings = ("off", "on") if issubclass(architecture, SparseDetector) else ("on",)
    return [{**common, **measure(output, data / experiment.set, nms)} for nms in settings]


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run one experiment and write its rows as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", help="folder of the dataset below --data")
    parser.add_argument("config")
    parser.add_argument("seed", type=int)
    parser.add_argument("opts", nargs="*", help="KEY VALUE ...")
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    parser.add_argument("--rows", type=Path, required=True, help="file to write the rows to")
    args = parser.parse_args(argv)
    # A signal to the whole group is for the training process, which saves its state; what follows
    # takes a minute at most. Not SIG_IGN, which that process would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    rows = run(Experiment(args.set, args.config, args.seed, tuple(args.opts)), args.data)
    args.rows.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
