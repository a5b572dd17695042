"""Time and memory of the cascade's training step with recollection (SQR), by start.

A step is cascade, matching and losses, forward and backward, without the backbone. Ratios are to
the plain cascade; "share" is the ratio over that of the groups. "bound" is the time of the step's
matrix products at the speed of large ones, recomputed ones included, fused attention on a CPU left
out. Memory is that of the step's tensors, without parameters and pyramid.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import now
from benchmarks.speed import add_config_arguments, median_ratio, time_in_turn
from benchmarks.worker import LevelwisePooling, Shape, add_shape_arguments, at_least_one
from dsrcnn.config.load import load_cfg
from dsrcnn.config.validate import architecture_of
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import DeformableDETR, SparseRCNN
from dsrcnn.modeling.decoder import Cascade, DynamicHead
from dsrcnn.modeling.decoder.sqr import Window, plain_windows, recollection_windows
from dsrcnn.structures import Predictions, Proposals, Targets

_VARIANT = r"dense|(loop|official)-[1-9]\d*|(start|checkpoint)-[1-9]\d*(-chunk-[1-9]\d*)?"
_DEFAULT = "start-3 start-2 start-1 dense loop-1 official-1 checkpoint-1 checkpoint-1-chunk-4 "
_DEFAULT += "checkpoint-1-chunk-1"


def refine_by_loop(
    head: Cascade, features: list[Tensor], proposals: Proposals, windows: Sequence[Window]
) -> Iterator[Predictions]:
    """SQR as its first public implementation runs it: a list of groups and one call for each.

    Arguments are those of `Cascade.forward` and the windows of all stages; yields the predictions
    of one group after the other, in the order of the batched cascade.
    """
    pyramid = head.prepare(features)
    boxes, states = [proposals.boxes], [proposals.features]
    for number, (stage, window) in enumerate(zip(head.stages, windows, strict=True)):
        for index in range(*window):
            group = boxes[index][:, None], states[index][:, None]
            logits, refined, state = head.run_stage(stage, pyramid, *group, classify=True)
            boxes.append(refined[:, 0].detach() if head.refines_boxes else boxes[index])
            states.append(state[:, 0])
            place = torch.tensor([number], device=logits.device)
            yield Predictions(logits.transpose(0, 1), refined.transpose(0, 1), place)
        if number == 0 and head.refines_boxes:
            boxes[0] = boxes[0].detach()


class Variant(NamedTuple):
    """A way to run the cascade.

    Attributes:
        windows: of the stages.
        loop: refine by `refine_by_loop`.
        by_level: the loop also pools level by level, as the official head does.
        checkpoint: as ``SQR.ACTIVATION_CHECKPOINT``.
        chunk: as ``SQR.CHUNK``.
    """

    windows: tuple[Window, ...]
    loop: bool = False
    by_level: bool = False
    checkpoint: bool = False
    chunk: int = 0

    @classmethod
    def from_name(cls, name: str, stages: int) -> "Variant":
        """Parse a value of ``--variants``; "plain" is the cascade without recollection.

        Raises:
            ConfigError: if there is no such variant or stage.
        """
        if name == "plain":
            return cls(plain_windows(stages))
        if not re.fullmatch(_VARIANT, name):
            raise ConfigError(
                f"--variants names {name!r}; write dense, start-<stage>, loop-<stage>, "
                "official-<stage> or checkpoint-<stage>, such as start-1 or checkpoint-1-chunk-4."
            )
        if name == "dense":
            return cls(recollection_windows(stages, dense=True))
        kind, start, *chunk = name.replace("-chunk", "").split("-")
        if int(start) > stages:
            raise ConfigError(f"--variants names {name!r}; write a stage from 1 to {stages}.")
        return cls(
            recollection_windows(stages, num_plain_stages=int(start)),
            loop=kind in ("loop", "official"),
            by_level=kind == "official",
            checkpoint=kind == "checkpoint",
            chunk=int(chunk[0]) if chunk else 0,
        )


class Step:
    """A training step of a cascade on random features, proposals and targets."""

    def __init__(self, cfg: CfgNode, shape: Shape) -> None:
        torch.manual_seed(0)
        model: Any = build_model(cfg)
        self.head: Cascade = model.head.train()
        self.matcher, self.criterion = model.matcher, model.criterion
        self.poolings: dict[bool, nn.Module] = {}  # by level or not
        if isinstance(self.head, DynamicHead):
            pooling = self.head.roi_features
            self.poolings = {False: pooling, True: LevelwisePooling(pooling)}
        node, device, images = cfg.MODEL.SparseRCNN, model.device, shape.images
        size = torch.tensor([shape.width, shape.height] * 2, dtype=torch.float32, device=device)
        levels = [(node.HIDDEN_DIM, shape.height // s, shape.width // s) for s in self.head.strides]
        self.features = [torch.randn(images, *x, device=device).requires_grad_() for x in levels]
        count = (images, node.NUM_PROPOSALS)
        states = torch.randn(*count, node.HIDDEN_DIM, device=device, requires_grad=True)
        self.proposals = Proposals(size * _random_boxes(*count, device), states)
        labels = torch.randint(node.NUM_CLASSES, (images, shape.objects), device=device)
        boxes = size * _random_boxes(images, shape.objects, device)
        mask = torch.ones_like(labels, dtype=torch.bool)
        self.targets = Targets(boxes, labels, mask, size.expand(images, 4))

    def losses(self, variant: Variant) -> Tensor:
        """Sum of all losses of all groups.

        Raises:
            ConfigError: if the head pools no RoIs and the variant is to pool by level.
        """
        if variant.by_level and not self.poolings:
            raise ConfigError(
                f"--variants names 'official-...', but {type(self.head).__name__} pools no RoIs; "
                "write loop-<stage>."
            )
        if self.poolings:
            self.head.roi_features = self.poolings[variant.by_level]
        if variant.loop:
            groups = refine_by_loop(self.head, self.features, self.proposals, variant.windows)
            return torch.stack([self._loss_of(group) for group in groups]).sum()
        self.head.windows = variant.windows
        self.head.checkpoint_recollection = variant.checkpoint
        self.head.chunk = variant.chunk
        return self._loss_of(self.head(self.features, self.proposals, recollect=True))

    def _loss_of(self, predictions: Predictions) -> Tensor:
        assignment = self.matcher(predictions, self.targets)
        losses = self.criterion(predictions, self.targets, assignment)
        return torch.stack(list(losses.values())).sum()

    def run(self, variant: Variant) -> None:
        """Run forward and backward pass."""
        self.head.zero_grad()
        self.losses(variant).backward()

    def peak(self, variant: Variant) -> int:
        """Largest memory of its tensors in bytes, without gradients of parameters."""
        self.run(variant)
        self.head.zero_grad(set_to_none=False)
        on_gpu = next(self.head.parameters()).is_cuda
        return peak_memory_of(lambda: self.losses(variant).backward(), on_gpu=on_gpu)


def _random_boxes(images: int, count: int, device: torch.device) -> Tensor:
    """(images, count, 4) in the unit square."""
    corner = torch.rand(images, count, 2, device=device) * 0.6
    return torch.cat([corner, corner + 0.05 + 0.3 * torch.rand_like(corner)], dim=-1)


def peak_memory_of(run: Callable[[], object], *, on_gpu: bool) -> int:
    """Largest memory of tensors during a run in bytes, beyond those that existed before it.

    On a GPU the allocator counts. On a CPU, which keeps no count, every allocation is recorded, so
    the run is slower than otherwise.
    """
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a run.

    Kernels that torch has no formula for, such as fused attention on CPUs, are left out.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def flops_per_second(device: torch.device, *, size: int | None = None) -> float:
    """Measure how fast a device multiplies large float32 matrices: the best of five rounds.

    Sides are 2048 on CPUs, and 8192 on GPUs, where launching a small product takes longer than it.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    first, second = torch.randn(2, size, size, device=device)
    product = torch.empty_like(first)
    seconds = []
    for _ in range(6):  # the first warms up
        start = now()
        torch.mm(first, second, out=product)
        seconds.append(now() - start)
    return 2 * size**3 / min(seconds[1:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser, "coco/sparse_rcnn_R50_100pro_3x")
    add_shape_arguments(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=_DEFAULT.split(),
        help="of start-<stage>, dense, loop-<stage> (one call per group), official-<stage> (the "
        "same, pooled as the official head does), checkpoint-<stage>; start and checkpoint with "
        "-chunk-<groups>, too",
    )
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds (default: 5)")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    opts = ["MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", "False", *args.set]
    cfg = load_cfg(args.config_file, opts)
    if not issubclass(architecture_of(cfg), SparseRCNN):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which has no cascade of "
            "stages; write a config of SparseRCNN or a subclass of it."
        )
    if issubclass(architecture_of(cfg), DeformableDETR):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, whose cascade reads "
            "encoded tokens, but the benchmark has pyramids. Write SparseRCNN or AdaMixer."
        )
    stages, shape = cfg.MODEL.SparseRCNN.NUM_HEADS, Shape.from_args(args)
    variants = {name: Variant.from_name(name, stages) for name in ("plain", *args.variants)}
    step = Step(cfg, shape)
    runs = {name: partial(step.run, variant) for name, variant in variants.items()}
    seconds = time_in_turn(runs, args.repeats)
    speed = flops_per_second(torch.device(cfg.MODEL.DEVICE))
    rows = []
    for name, variant in variants.items():
        groups = sum(w.stop - w.first for w in variant.windows)
        ratio = median_ratio(seconds[name], seconds["plain"])
        bound, peak = flops_of(runs[name]) / speed, step.peak(variant) / 2**20
        share = ratio * stages / groups
        rows.append([name, groups, median(seconds[name]), bound, ratio, share, peak])
    headers = ["", "groups", "s / step", "bound (s)", "ratio", "share", "peak (MiB)"]
    formats = ("", "", ".3f", ".3g", ".2f", ".2f", ".1f")
    table = tabulate(rows, headers, floatfmt=formats, tablefmt="pipe")
    print(f"\n{shape}, {args.repeats} rounds, medians\n\n{table}")
    print(f"\nbound: time of the matrix products at {speed / 1e9:.0f} GFLOP/s")
