"""What recollection costs: a training step of the cascade by groups, in one run."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.matrix_products import operations_of, operations_per_second
from benchmarks.memory import peak_memory_of
from benchmarks.plain import level_wise_pooling
from benchmarks.reference_recollection import refine_by_loop
from dsrcnn.analysis.images import expect_cascade
from dsrcnn.config.load import load_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.decoder import AdaMixerDecoder, DynamicHead
from dsrcnn.modeling.decoder.sqr import Window, plain_windows, recollection_windows
from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.modeling.matching import build_matcher
from dsrcnn.structures import Predictions, Proposals, Targets

__all__ = ["compare_recollection"]

_MIB = 2**20


class _Variant(NamedTuple):
    """A way to run the cascade: its windows, and how.

    Attributes:
        windows: of the stages.
        loop: one call for every group, by a slower second implementation.
        by_level: the loop also pools level by level, as the official head does.
        checkpoint: as ``SQR.CHECKPOINT``.
        chunk: as ``SQR.CHUNK``.
    """

    windows: tuple[Window, ...]
    loop: bool = False
    by_level: bool = False
    checkpoint: bool = False
    chunk: int = 0


def compare_recollection(
    config: str,
    names: list[str],
    opts: list[str],
    *,
    images: int = 2,
    height: int = 480,
    width: int = 640,
    objects: int = 7,
    repeats: int = 5,
) -> str:
    """Measure variants in turn: seconds of a training step of the cascade, and peak memory.

    A step is cascade, matching and losses, forward and backward, without the backbone. Ratios are
    to the plain cascade; ``share`` is the ratio over that of the groups. ``bound`` is what the
    step's matrix products would take at the speed of large ones, of what checkpoints compute again,
    too; fused attention on a CPU is left out. Memory is that of the step's tensors,
    without parameters and the pyramid.

    Args:
        config: YAML file or shipped name.
        names: of ``start-<stage>``, ``dense``, ``loop-<stage>``, ``official-<stage>`` (a loop that
            pools as the official head) and ``checkpoint-<stage>``; the first and the last may go on
            with ``-chunk-<groups>``.
        opts: ``KEY, VALUE, ...``.
        images: of the batch.
        height: of the images in pixels.
        width: of the images in pixels.
        objects: per image.
        repeats: rounds.

    Raises:
        ConfigError: if there is no such stage, or nothing to pool officially.
    """
    cfg = load_cfg(config, ["MODEL.WEIGHTS", "", *opts])
    expect_cascade(cfg, "dsrcnn benchmark-recollection")
    if cfg.MODEL.META_ARCHITECTURE == "AdaMixer" and any(n.startswith("official") for n in names):
        raise ConfigError(
            "--variants names 'official-...', but AdaMixer pools no RoIs; write loop-<stage>."
        )
    stages = cfg.MODEL.SparseRCNN.NUM_HEADS
    variants = {"plain": _Variant(plain_windows(stages))}
    variants |= {name: _variant(name, stages) for name in names}
    step = _Step(cfg, images, height, width, objects)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = [name for _ in range(repeats + 1) for name in variants]
    for name in tqdm(order, desc="measuring"):
        seconds[name].append(step.seconds(variants[name]))
    plain = seconds["plain"][1:]  # the first round warms up
    speed = operations_per_second(torch.device(cfg.MODEL.DEVICE))
    rows = []
    for name, variant in variants.items():
        own = seconds[name][1:]
        groups = sum(w.end - w.start for w in variant.windows)
        ratio = median(a / b for a, b in zip(own, plain, strict=True))
        bound = step.operations(variant) / speed
        share, peak = ratio * stages / groups, step.peak(variant) / _MIB
        rows.append([name, groups, median(own), bound, ratio, share, peak])
    headers = ["", "groups", "s / step", "bound (s)", "ratio", "share", "peak (MiB)"]
    formats = ("", "", ".3f", ".3g", ".2f", ".2f", ".1f")
    table = tabulate(rows, headers, floatfmt=formats, tablefmt="pipe")
    return f"{table}\n\nbound: what the matrix products would take at {speed / 1e9:.0f} GFLOP/s"


def _variant(name: str, stages: int) -> _Variant:
    if name == "dense":
        return _Variant(recollection_windows(stages, dense=True))
    kind, start, *chunk = name.replace("-chunk", "").split("-")
    if int(start) > stages:
        raise ConfigError(f"--variants names {name!r}, but there are {stages} stages.")
    windows = recollection_windows(stages, start=int(start))
    return _Variant(
        windows,
        loop=kind in ("loop", "official"),
        by_level=kind == "official",
        checkpoint=kind == "checkpoint",
        chunk=int(chunk[0]) if chunk else 0,
    )


class _Step:
    """A training step of a cascade on random features."""

    def __init__(self, cfg: CfgNode, images: int, height: int, width: int, objects: int) -> None:
        torch.manual_seed(0)
        device = torch.device(cfg.MODEL.DEVICE)
        node = cfg.MODEL.SparseRCNN
        kind = AdaMixerDecoder if cfg.MODEL.META_ARCHITECTURE == "AdaMixer" else DynamicHead
        self.head = kind(cfg).to(device).train()
        self.pooling = getattr(self.head, "roi_features", None)
        self.matcher = build_matcher(cfg)
        self.criterion = SetCriterion(cfg).to(device)
        size = torch.tensor([width, height] * 2, dtype=torch.float32, device=device)
        self.features = [
            torch.randn(
                images, node.HIDDEN_DIM, height // s, width // s, device=device
            ).requires_grad_()
            for s in self.head.strides
        ]
        shape = (images, node.NUM_PROPOSALS)
        states = torch.randn(*shape, node.HIDDEN_DIM, device=device, requires_grad=True)
        self.proposals = Proposals(size.mul(_random_boxes(*shape, device)), states)
        labels = torch.randint(node.NUM_CLASSES, (images, objects), device=device)
        self.targets = Targets(
            size * _random_boxes(images, objects, device),
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            size.expand(images, 4),
        )

    def _losses(self, variant: _Variant) -> Tensor:
        run: Callable[[Predictions], Tensor] = self._loss_of
        if self.pooling is not None:
            by_level = variant.by_level
            self.head.roi_features = level_wise_pooling(self.pooling) if by_level else self.pooling
        if variant.loop:
            groups = refine_by_loop(self.head, self.features, self.proposals, variant.windows)
            return torch.stack([run(group) for group in groups]).sum()
        self.head.windows = variant.windows
        self.head.checkpoint_recollection = variant.checkpoint
        self.head.chunk = variant.chunk
        return run(self.head(self.features, self.proposals))

    def _loss_of(self, predictions: Predictions) -> Tensor:
        assignment = self.matcher(predictions, self.targets)
        return torch.stack(
            list(self.criterion(predictions, self.targets, assignment).values())
        ).sum()

    def seconds(self, variant: _Variant) -> float:
        """Time of forward and backward pass."""
        self.head.zero_grad()
        _wait()
        start = time.perf_counter()
        self._losses(variant).backward()
        _wait()
        return time.perf_counter() - start

    def operations(self, variant: _Variant) -> int:
        """Floating-point operations of its matrix products, in both passes."""
        return operations_of(lambda: self._losses(variant).backward())

    def peak(self, variant: _Variant) -> int:
        """Bytes of its tensors at the highest point; those of gradients are there before."""
        self.seconds(variant)
        self.head.zero_grad(set_to_none=False)
        return peak_memory_of(lambda: self._losses(variant).backward())


def _random_boxes(images: int, count: int, device: torch.device) -> Tensor:
    """(images, count, 4) in the unit square."""
    corner = torch.rand(images, count, 2, device=device) * 0.6
    return torch.cat([corner, corner + 0.05 + 0.3 * torch.rand_like(corner)], dim=-1)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
