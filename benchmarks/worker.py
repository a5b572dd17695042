"""One variant under measurement, in a process of its own.

Started as a file, so that it can also measure another checkout of the package: whatever ``dsrcnn``
the process finds is measured. It builds the model once, then answers every line on stdin with one
line of JSON: seconds of each part of one training step or one inference.
"""

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

import dsrcnn  # before detectron2, which 0.6 needs bridged

# isort: split

_PARTS = ("backbone", "head", "matcher", "criterion")
_METHODS = ("postprocess",)


class PartTimer:
    """Adds up the forward time of the named parts of a model, by hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}
        for name in _PARTS:
            part = getattr(model, name, None)
            if part is not None:
                part.register_forward_pre_hook(lambda *_, name=name: self._start(name))
                part.register_forward_hook(lambda *_, name=name: self._stop(name))
        for name in _METHODS:
            if hasattr(model, name):
                setattr(model, name, self._timed(name, getattr(model, name)))

    def _start(self, name: str) -> None:
        self._started[name] = now()

    def _stop(self, name: str) -> None:
        self.seconds[name] += now() - self._started.pop(name)

    def _timed(self, name: str, method: Any) -> Any:
        def run(*args: Any) -> Any:
            self._start(name)
            result = method(*args)
            self._stop(name)
            return result

        return run

    def collect(self) -> dict[str, float]:
        """What was added up since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def now() -> float:
    """Seconds, after the device has finished what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_batch(images: int, height: int, width: int, objects: int, classes: int) -> list[dict]:
    """Random images with random boxes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(objects, 2, generator=generator) * 0.6
        extent = 0.1 + torch.rand(objects, 2, generator=generator) * 0.3
        scale = torch.tensor([width, height] * 2)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1) * scale)
        instances.gt_classes = torch.randint(classes, (objects,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[dict], timer: PartTimer
) -> dict[str, float]:
    """One step; seconds in total and by part."""
    model.train()
    start = now()
    total = sum(model(batch).values())
    forward = now()
    optimizer.zero_grad()
    total.backward()
    backward = now()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    end = now()
    return {
        **timer.collect(),
        "forward": forward - start,
        "backward": backward - forward,
        "forward + backward": backward - start,
        "optimizer": end - backward,
        "step": end - start,
    }


def infer(model: nn.Module, batch: list[dict], timer: PartTimer) -> dict[str, float]:
    """One inference; what no part accounts for is preprocessing and the proposals."""
    model.eval()
    with torch.inference_mode():
        start = now()
        model(batch)
        total = now() - start
    parts = timer.collect()
    return {**parts, "rest": total - sum(parts.values()), "inference": total}


def make_loop(cfg: Any, model: nn.Module, batch: list[dict]) -> Any:
    """The package's training loop on one batch that comes again and again."""
    from itertools import repeat

    from dsrcnn.engine.train_loop import TrainLoop
    from dsrcnn.solver import build_optimizer

    loop = TrainLoop.from_config(cfg, model, repeat(batch), build_optimizer(cfg, model))
    loop.iter = 0
    return loop


def loop_step(loop: Any) -> dict[str, float]:
    """One iteration of the training loop; seconds."""
    from detectron2.utils.events import EventStorage

    with EventStorage():
        start = now()
        loop.run_step()
        return {"iteration": now() - start}


def peak_memory() -> float:
    """Peak memory of this process in MiB: of the GPU if there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Build, then answer lines until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--mode", choices=["train", "inference", "loop"], required=True)
    for name in ("images", "height", "width", "objects", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--without", default="", help="optimisations to undo, comma separated")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    without = [name for name in args.without.split(",") if name]
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg = dsrcnn.load_cfg(args.config_file, args.opts)
    model = build_model(cfg)
    if without:
        from benchmarks.plain import plain_optimizer, undo

        undo(model, [name for name in without if name != "optimizer"])
    shape = (args.images, args.height, args.width, args.objects)
    batch = make_batch(*shape, classes=cfg.MODEL.SparseRCNN.NUM_CLASSES)
    measure: Any = train_step if args.mode == "train" else infer
    arguments: list[Any]
    if args.mode == "loop":
        measure, arguments = loop_step, [make_loop(cfg, model, batch)]
    else:  # hooks of a timer wait for the GPU, which a loop is not to do
        arguments = [model, batch, PartTimer(model)]
    if args.mode == "train":
        from dsrcnn.solver import build_optimizer

        optimizer = build_optimizer(cfg, model)
        arguments.insert(1, plain_optimizer(optimizer) if "optimizer" in without else optimizer)
    for _ in sys.stdin:
        # Once unmeasured: while the other variant ran, the system may have reclaimed memory.
        measure(*arguments)
        print(json.dumps({**measure(*arguments), "peak memory (MiB)": peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
