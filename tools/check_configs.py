#!/usr/bin/env python
r"""Build each config, train it for one step and evaluate it on a few real images, reduced in size.

    python tools/check_configs.py --data datasets/coco
    python tools/check_configs.py --data datasets/coco --configs coco/asag_s_R50_100pro_3x

DATA is a folder in the layout of COCO 2017. Weights are random, so nothing is downloaded and AP is
0; what is checked is that every config runs from end to end on these records. The exit status is 1
if one does not.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dsrcnn  # before detectron2

# isort: split
import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from dsrcnn.config import read_cfg, shipped_configs
from dsrcnn.config.validate import num_classes_key
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import DsrcnnError

FOLDERS = ("coco", "ablation", "dynamic_rcnn", "crowdhuman")
_TRAINED = 8  # images to train on


class Checked(NamedTuple):
    """Result of one config.

    Attributes:
        config: its name.
        parameters: in millions.
        loss: total loss of the step.
        detections: on the test images.
        seconds: that it took.
        problem: why it does not run; empty if it does.
    """

    config: str
    parameters: float = float("nan")
    loss: float = float("nan")
    detections: int = 0
    seconds: float = float("nan")
    problem: str = ""


def check_config(name: str, sample: list[str], output: Path, *, side: int) -> Checked:
    """Train a config for one step of two images, and evaluate it.

    Args:
        name: shipped config or file.
        sample: overrides of `write_sample`.
        output: folder of the run.
        side: short side of the images in pixels.
    """
    start = time.perf_counter()
    try:
        cfg = dsrcnn.load_cfg(name, [*_options(name, side), *sample, "OUTPUT_DIR", str(output)])
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        loss = _step(trainer)
        Trainer.test(cfg, trainer.model)
        found = json.loads((output / "inference/coco_instances_results.json").read_text())
    except DsrcnnError as error:
        return Checked(name, problem=str(error))
    except Exception as error:  # any defect is a row of the table, and the others are still checked
        traceback.print_exc()
        return Checked(name, problem=f"{type(error).__name__}: {error}")
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    return Checked(name, parameters, loss, len(found), time.perf_counter() - start)


def _step(trainer: Trainer) -> float:
    """Train for one iteration, without files, and return the total loss."""
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    return trainer.storage.latest()["total_loss"][0]


def _options(name: str, side: int) -> list[str]:
    options: dict[str, object] = {
        "MODEL.WEIGHTS": "",
        "MODEL.TIMM.PRETRAINED": False,
        "MODEL.SparseRCNN.NUM_PROPOSALS": 50,  # recollection in seven stages needs 20 GB with 300
        "MODEL.DEVICE": "cpu",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        **{f"SOLVER.EPOCHS.{x}": 0 for x in ("MAX", "WARMUP", "CHECKPOINT", "EVAL")},
        "SOLVER.EPOCHS.STEPS": (),
        "SOLVER.CHECKPOINTS_KEPT": 1,
        "INPUT.MIN_SIZE_TRAIN": (side,),
        "INPUT.MIN_SIZE_TEST": side,
        "INPUT.MAX_SIZE_TRAIN": 2 * side,
        "INPUT.MAX_SIZE_TEST": 2 * side,
        "INPUT.CROP.ENABLED": False,
        "DATALOADER.NUM_WORKERS": 0,
        "TEST.EVAL_PERIOD": 0,
        "TEST.AUG.ENABLED": False,
        "LOG.IMAGES": 0,
        "SEED": 1,
    }
    key = num_classes_key(read_cfg(name))
    if key is not None:
        options[key] = 0  # from the data
    return [str(x) for pair in options.items() for x in pair]


def write_sample(data: Path, folder: Path, images: int) -> list[str]:
    """Write a part of the annotations, and return the overrides that make it the dataset.

    Args:
        data: folder in the layout of COCO 2017.
        folder: where to write.
        images: number of test images.
    """
    custom: dict[str, object] = {"NAME": "sample"}
    for split, part, count in (("TRAIN", "train", _TRAINED), ("TEST", "val", images)):
        content = json.loads((data / f"annotations/instances_{part}2017.json").read_text())
        annotated = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd")}
        content["images"] = [x for x in content["images"] if x["id"] in annotated][:count]
        kept = {x["id"] for x in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        file = folder / f"{part}.json"
        file.write_text(json.dumps(content))
        custom |= {f"{split}_JSON": file, f"{split}_IMAGES": data / f"{part}2017"}
    return [str(x) for k, v in custom.items() for x in (f"DATASETS.CUSTOM.{k}", v)]


def main(argv: Sequence[str] | None = None) -> int:
    """Check configs and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder in the layout of COCO 2017"
    )
    text = f"names of configs; all of {', '.join(FOLDERS)} without it"
    parser.add_argument("--configs", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--side", type=int, default=128, help="short side in pixels (128)")
    parser.add_argument("--images", type=int, default=4, help="test images (4)")
    args = parser.parse_args(argv)
    names = args.configs or [n for n in shipped_configs() if n.split("/")[0] in FOLDERS]
    names = [n for n in names if not Path(n).name.startswith("Base")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sample = write_sample(args.data, Path(folder), args.images)
        for number, name in enumerate(names, start=1):
            row = check_config(name, sample, Path(folder) / "out", side=args.side)
            rows.append(row)
            state = row.problem or "runs"
            print(f"{number}/{len(names)} {name}: {state}", file=sys.stderr, flush=True)
    print(tabulate(rows, Checked._fields, tablefmt="github", floatfmt=".1f"))
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
