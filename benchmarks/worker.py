"""Measure one variant in a separate process.

Started as a file that imports ``dsrcnn`` and one file beside it, so it measures whatever checkout
of the package is first on the path. It builds the model once, writes a line of JSON with the device
and the package, then answers every line on stdin with another: seconds of the parts of a training
step or an inference.
"""

import argparse
import json
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import dsrcnn  # before detectron2, which 0.6 needs bridged

# isort: split

import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

if __package__:
    from benchmarks.counting import count, now, products_alone
else:  # started as a file, whose folder is the first on the path
    from counting import count, now, products_alone

_PARTS = ("backbone", "head", "matcher", "criterion")


class Shape(NamedTuple):
    """Sizes of a random batch.

    Attributes:
        images: batch size.
        height: of every image in pixels.
        width: of every image in pixels.
        objects: ground truths per image.
    """

    images: int
    height: int
    width: int
    objects: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Shape":
        """Read the options of `add_shape_arguments`."""
        height, width = args.size
        return cls(args.images, height, width, args.objects)

    def __str__(self) -> str:
        """Text for the heading of a table."""
        return f"{self.images} images {self.height}x{self.width}"


def at_least_one(text: str) -> int:
    """Parse an option that counts.

    Raises:
        ArgumentTypeError: unless it is a whole number of at least 1.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_shape_arguments(
    parser: argparse.ArgumentParser, *, images: int = 2, objects: int = 7
) -> None:
    """Declare the options of a `Shape` with their defaults; 0 objects are no option."""
    text = f"batch size (default: {images})"
    parser.add_argument("--images", type=at_least_one, default=images, help=text)
    size = parser.add_argument("--size", type=at_least_one, nargs=2, default=(480, 640))
    size.metavar = ("H", "W")
    parser.set_defaults(objects=objects)
    if objects:
        text = f"per image (default: {objects})"
        parser.add_argument("--objects", type=at_least_one, default=objects, help=text)


def make_batch(shape: Shape, classes: int) -> list[dict[str, Any]]:
    """Random images with random boxes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images, height, width, objects = shape
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


class _PartTimer:
    """Sums of the forward times of a model's parts, and of its post-processing."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}
        for name, part in model.named_children():
            if name in _PARTS:
                part.register_forward_pre_hook(lambda *_, name=name: self._start(name))
                part.register_forward_hook(lambda *_, name=name: self._stop(name))
        # `select` since evaluation is one function of tensors, `postprocess` in older checkouts.
        method = "select" if hasattr(model, "detect") else "postprocess"
        if hasattr(model, method):
            setattr(model, method, self._timed("postprocess", getattr(model, method)))

    def _start(self, name: str) -> None:
        self._started[name] = now()

    def _stop(self, name: str) -> None:
        self.seconds[name] += now() - self._started.pop(name)

    def _timed(self, name: str, method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._start(name)
            result = method(*args, **kwargs)
            self._stop(name)
            return result

        return run

    def collect(self) -> dict[str, float]:
        """Return the sums since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def _train_step(
    model: nn.Module,
    batch: list[dict[str, Any]],
    timer: _PartTimer,
    optimizer: Any,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """Seconds of one training step, by part and in total."""
    model.train()
    start = now()
    with autocast:
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


@torch.inference_mode()
def _infer(
    model: nn.Module,
    batch: list[dict[str, Any]],
    timer: _PartTimer,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """Seconds of one inference; preprocessing and proposals are the rest."""
    model.eval()
    start = now()
    with autocast:
        model(batch)
    total = now() - start
    parts = timer.collect()
    return {**parts, "rest": total - sum(parts.values()), "inference": total}


def _iterate(loop: Any) -> dict[str, float]:
    """Seconds of one iteration of the package's training loop."""
    with EventStorage():
        start = now()
        loop.run_step()
        return {"iteration": now() - start}


def _build_measurement(
    cfg: Any, model: nn.Module, batch: list[dict[str, Any]], mode: str, plain_optimizer: bool
) -> Callable[[], dict[str, float]]:
    amp = cfg.SOLVER.AMP
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp.PRECISION]
    autocast = torch.autocast(cfg.MODEL.DEVICE.split(":")[0], dtype, enabled=amp.ENABLED)
    if mode == "count":
        return partial(_count_inference, model, batch, autocast, not cfg.TEST.CUDA_GRAPH)
    # Hooks would wait inside of a graph that is being captured.
    timer = _PartTimer(nn.Module() if cfg.TEST.CUDA_GRAPH else model)
    if mode == "inference":
        return partial(_infer, model, batch, timer, autocast)
    from dsrcnn.solver import build_optimizer

    optimizer = build_optimizer(cfg, model)
    if plain_optimizer:
        optimizer = _ungrouped(optimizer)
    if mode == "train":
        return partial(_train_step, model, batch, timer, optimizer, autocast)
    from dsrcnn.engine.train_loop import TrainLoop

    # The same batch again and again; no timer, as its hooks wait for the GPU.
    loop = TrainLoop.from_config(cfg, model, repeat(batch), optimizer)
    loop.iter = 0
    return partial(_iterate, loop)


# Optimizations that can be undone. Without them the model computes the common way: the operations
# of the official code on Detectron2's layers. Results stay the same to rounding.


def _convolve_then_normalize(conv: Any, x: Tensor) -> Tensor:
    x = conv.norm(nn.Conv2d.forward(conv, x))
    return x if conv.activation is None else conv.activation(x)


def _unfold_norms(backbone: nn.Module) -> None:
    """Run convolution and frozen norm one after the other."""
    from dsrcnn.layers.norm import FrozenNormConv2d

    for module in backbone.modules():
        if isinstance(module, FrozenNormConv2d):
            module.forward = partial(_convolve_then_normalize, module)  # type: ignore[method-assign]


def _use_channels_first(backbone: nn.Module) -> None:
    backbone.to(memory_format=torch.contiguous_format)
    backbone.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))


class LevelwisePooling(nn.Module):
    """Detectron2's pooler, level by level, with the permutations that the stages then need."""

    def __init__(self, pooling: Any) -> None:
        """Replace `pooling`, the `RoIFeatures` of a head."""
        super().__init__()
        scales = tuple(1.0 / s for s in pooling.strides)
        self.pooler = ROIPooler(pooling.resolution, scales, pooling.samples, "ROIAlignV2")

    def prepare(self, features: list[Tensor]) -> list[Tensor]:
        """Return the levels as they are."""
        return features

    def forward(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """Pool boxes (B, R, 4) into (B * R, K, D)."""
        pooled = self.pooler(features, [Boxes(b) for b in boxes])
        return pooled.flatten(2).permute(2, 0, 1).permute(1, 0, 2)


OPTIMIZATIONS: dict[str, Callable[[Any], None]] = {
    "norms": lambda model: _unfold_norms(model.backbone),
    "layout": lambda model: _use_channels_first(model.backbone),
    "pooling": lambda model: setattr(
        model.head, "roi_features", LevelwisePooling(model.head.roi_features)
    ),
}


def undo(model: nn.Module, names: Sequence[str]) -> None:
    """Undo the named `OPTIMIZATIONS` of a model in place."""
    for name in names:
        OPTIMIZATIONS[name](model)


def _ungrouped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """AdamW as the official code runs it: a group per parameter, not fused."""
    groups = [
        {"params": [p], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return torch.optim.AdamW(groups)


def build_official(folder: str, cfg: Any) -> nn.Module:
    """Build the official model from the ``sparsercnn`` package in a folder, and the same config.

    Raises:
        ConfigError: if the package is not there, or cannot be imported.
    """
    from detectron2.modeling import META_ARCH_REGISTRY

    from dsrcnn.errors import ConfigError

    if not (Path(folder) / "sparsercnn/detector.py").is_file():
        raise ConfigError(
            f"{folder} has no sparsercnn/detector.py; give the folder projects/SparseRCNN of a "
            "clone of the official code."
        )
    sys.path.insert(0, folder)
    # Both packages register the name; the official one fails on a name that is taken.
    taken = META_ARCH_REGISTRY._obj_map.pop("SparseRCNN")
    try:
        from sparsercnn.detector import SparseRCNN
    except ImportError as error:
        raise ConfigError(f"The official code in {folder} cannot be imported: {error}") from error
    finally:
        META_ARCH_REGISTRY._obj_map["SparseRCNN"] = taken
    return SparseRCNN(cfg)  # type: ignore[no-any-return]


@torch.no_grad()
def _count_inference(
    model: nn.Module,
    batch: list[dict[str, Any]],
    autocast: AbstractContextManager[Any],
    products: bool,
) -> dict[str, float]:
    """Count what an inference starts, and time its products; not in a graph, which hides them."""
    model.eval()

    def run() -> None:
        with autocast:
            model(batch)

    counts = count(run, on_gpu=_is_on_gpu(model))
    return {**counts, "products alone": products_alone(run)} if products else counts


def _is_on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _peak_memory(on_gpu: bool) -> float:
    """Peak memory of this process in MiB, of the GPU or of main memory."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Build the variant, then answer lines until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", required=True)
    modes = ["train", "inference", "loop", "count"]
    parser.add_argument("--mode", choices=modes, required=True)
    add_shape_arguments(parser)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--without", default="")
    parser.add_argument("--official", default="")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    without = [name for name in args.without.split(",") if name]
    torch.manual_seed(0)
    cfg = dsrcnn.load_cfg(args.config_file, args.opts)
    model = build_official(args.official, cfg) if args.official else build_model(cfg)
    undo(model, [name for name in without if name != "optimizer"])
    batch = make_batch(Shape.from_args(args), cfg.MODEL.SparseRCNN.NUM_CLASSES)
    measure = _build_measurement(cfg, model, batch, args.mode, "optimizer" in without)
    if cfg.TEST.CUDA_GRAPH:
        measure()  # a graph is captured when a size is met for the second time
    on_gpu = _is_on_gpu(model)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(json.dumps({"device": device, "package": dsrcnn.__file__}), flush=True)
    for _ in sys.stdin:
        # Once unmeasured: while the other variant ran, the system may have reclaimed memory.
        measure()
        print(json.dumps({**measure(), "peak memory (MiB)": _peak_memory(on_gpu)}), flush=True)


if __name__ == "__main__":
    main()
