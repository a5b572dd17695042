"""Costs of a model by part: parameters, multiply-adds, memory kept for the backward pass, seconds.

Neither weights nor data are needed: weights and images are random.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import repeat
from statistics import median
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..config import load_cfg, read_cfg
from ..config.load import NO_DATA
from ..config.rules import value_of
from ..config.validate import architecture_of, num_classes_key
from ..engine.memory import is_out_of_memory
from ..engine.train_loop import TrainLoop
from ..errors import ConfigError
from ..modeling import SparseRCNN
from ..modeling.decoder import Stage
from ..solver import build_optimizer

OTHER = "other"  # what runs outside of all parts, such as pre- and post-processing
_CLASSES = 80
_OBJECTS = 7  # per image, about COCO's average
# Parts are measured as they are, and the images of a batch at once.
_BARE: tuple[object, ...] = (
    *("MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.WEIGHTS", ""),
    *("MODEL.COMPILE", False, "SOLVER.ACCUMULATE", 1),
    *NO_DATA,
)


class PartCost(NamedTuple):
    """Costs of a part, without those of parts inside of it.

    Attributes:
        parameters: number of them.
        trainable: number of those that get gradients.
        multiply_adds: of one image in inference, by convolutions, matrix products and attention.
        saved_bytes: activations that a training forward pass of the batch keeps for the backward.
        seconds: of an inference of the batch, median.
    """

    parameters: int = 0
    trainable: int = 0
    multiply_adds: int = 0
    saved_bytes: int = 0
    seconds: float = 0.0


class Complexity(NamedTuple):
    """Costs of a model.

    Attributes:
        parts: by name, in the order of the model; `OTHER` last.
        inference_seconds: of the batch, median.
        training_seconds: of a training step with the batch, update included; median.
    """

    parts: dict[str, PartCost]
    inference_seconds: float
    training_seconds: float

    @property
    def total(self) -> PartCost:
        """Sum over the parts; `seconds` is the median of whole inferences."""
        sums = PartCost(*(sum(column) for column in zip(*self.parts.values(), strict=True)))
        return sums._replace(seconds=self.inference_seconds)


def load_bare_cfg(config_file: str, opts: Sequence[object] = ()) -> tuple[CfgNode, list[str]]:
    """Load a config without weights and datasets.

    Returns:
        The config, and notes on what was assumed.

    Raises:
        ConfigError: if the config is invalid, or its model needs other inputs than boxes and masks.
    """
    cfg = read_cfg(config_file, opts)
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            "MODEL.KEYPOINT_ON is True, but costs are measured with boxes and masks only. Write "
            "MODEL.KEYPOINT_ON False."
        )
    words, notes = [*opts, *_BARE], []
    key = num_classes_key(cfg)
    if key and value_of(cfg, key) == 0:
        classes = len(cfg.DATASETS.CUSTOM.CLASSES) or _CLASSES
        words += [key, classes]
        notes.append(f"{key} is 0; {classes} classes are assumed.")
    if cfg.MODEL.COMPILE:
        notes.append("MODEL.COMPILE is True; stages are measured as they are, not compiled.")
    if not issubclass(architecture_of(cfg), SparseRCNN):
        notes.append("Costs depend on what the model detects, so trained weights change them.")
    return load_cfg(config_file, words), notes


def default_size(cfg: CfgNode) -> tuple[int, int]:
    """Return height and width of the largest test images.

    Raises:
        ConfigError: if the config does not resize test images.
    """
    height, width = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if not height:
        raise ConfigError(
            "INPUT.MIN_SIZE_TEST is 0, so test images keep their sizes. Write --size HEIGHT WIDTH."
        )
    return height, max(height, width)


def random_inputs(cfg: CfgNode, size: tuple[int, int], images: int) -> list[dict[str, Any]]:
    """Make model inputs of (height, width) with random boxes, and masks if the model has them."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    key = num_classes_key(cfg)
    classes = value_of(cfg, key) if key else 1
    inputs = []
    for _ in range(images):
        corner = torch.rand(_OBJECTS, 2, generator=generator) * 0.6
        extent = 0.1 + torch.rand(_OBJECTS, 2, generator=generator) * 0.3
        boxes = torch.cat([corner, corner + extent], dim=1) * torch.tensor([width, height] * 2)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(classes, (_OBJECTS,), generator=generator)
        if cfg.MODEL.MASK_ON:
            instances.gt_masks = _rectangles(boxes, size, cfg.INPUT.MASK_FORMAT)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def _rectangles(boxes: Tensor, size: tuple[int, int], form: str) -> PolygonMasks | BitMasks:
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    masks = PolygonMasks(polygons)
    return BitMasks.from_polygon_masks(masks, *size) if form == "bitmask" else masks


def build_loop(cfg: CfgNode, model: nn.Module, inputs: list[dict[str, Any]]) -> TrainLoop:
    """Build the training loop of a config over the same batch again and again."""
    loop = TrainLoop.from_config(cfg, model, repeat(inputs), build_optimizer(cfg, model))
    loop.iter = 0
    return loop


def find_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Name the parts of a model: its top-level modules, with neck and stages apart.

    Inner parts precede the ones that contain them.
    """
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        # An attribute of Detectron2's FPN and of this package's necks.
        bottom_up = getattr(child, "bottom_up", None)
        if isinstance(bottom_up, nn.Module):
            parts |= {name: bottom_up, "neck": child}
            continue
        stages = [x for series in child.children() for x in _stages(series)]
        parts |= {f"{name}, stage {n}": stage for n, stage in enumerate(stages, start=1)}
        parts[f"{name}, rest" if stages else name] = child
    return parts


def _stages(series: nn.Module) -> list[nn.Module]:
    members = list(series) if isinstance(series, nn.ModuleList) else []
    return members if all(isinstance(member, Stage) for member in members) else []


def count_parameters(
    model: nn.Module, parts: Mapping[str, nn.Module]
) -> dict[str, tuple[int, int]]:
    """Count all and trainable parameters by part; shared ones belong to the first."""
    counted: set[int] = set()
    counts = {}
    for name, module in {**parts, OTHER: model}.items():
        new = {id(p): p for p in module.parameters() if id(p) not in counted}
        counted |= new.keys()
        trainable = sum(p.numel() for p in new.values() if p.requires_grad)
        counts[name] = sum(p.numel() for p in new.values()), trainable
    return counts


@contextmanager
def amounts_by_part(
    parts: Mapping[str, nn.Module], read: Callable[[], float]
) -> Iterator[dict[str, float]]:
    """Attribute the growth of a meter to the innermost part that runs in the meantime.

    Args:
        parts: from `find_parts`.
        read: returns the state of the meter, such as seconds.

    Yields:
        A dictionary by part, complete at the end.
    """
    amounts: dict[str, float] = defaultdict(float)
    running, last = [OTHER], read()

    def settle() -> None:
        nonlocal last
        value = read()
        amounts[running[-1]] += value - last
        last = value

    def enter(name: str) -> None:
        settle()
        running.append(name)

    def leave(name: str) -> None:
        settle()
        if running[-1] == name:  # not one that was running before
            running.pop()

    with ExitStack() as stack:
        for name, part in parts.items():
            before = part.register_forward_pre_hook(lambda *_, name=name: enter(name))
            after = part.register_forward_hook(lambda *_, name=name: leave(name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield amounts
        settle()


class OperationCounter(TorchDispatchMode):
    """Count floating point operations by the formulas of ``torch.utils.flop_counter``.

    torch's own `FlopCounterMode` fails without gradients if a module returns a parameter.

    Attributes:
        total: operations so far; a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas: dict[Any, Callable[..., int]] = {
            **flop_registry,
            torch.ops.torchvision.deform_conv2d: _deformable_flops,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if formula := self._formulas.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _deformable_flops(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weight[0].numel()


@torch.no_grad()
def count_multiply_adds(
    model: nn.Module, parts: Mapping[str, nn.Module], inputs: list[dict[str, Any]]
) -> dict[str, float]:
    """Count multiply-adds of an inference by part.

    Convolutions, matrix products and attention count; norms, activations, sampling and pooling are
    left out, as is usual.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused operators have no formula
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            OperationCounter() as counter,
            amounts_by_part(parts, lambda: counter.total) as operations,
        ):
            model.eval()(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {name: value / 2 for name, value in operations.items()}


def measure_saved_bytes(loop: TrainLoop, parts: Mapping[str, nn.Module]) -> dict[str, float]:
    """Measure what a training step keeps between forward and backward pass, by part.

    Parameters, buffers and gradients are not included, nor is what the step needs for a moment.
    """
    model = loop.model
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor.detach()  # the tensor itself would be a reference cycle

    with (
        EventStorage(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        amounts_by_part(parts, lambda: total) as amounts,
    ):
        loop.run_step()
    return amounts


def measure(
    cfg: CfgNode, size: tuple[int, int], *, images: int = 1, repeats: int = 3
) -> Complexity:
    """Build the model of a config and measure it on random images.

    Args:
        cfg: from `load_bare_cfg`.
        size: height and width of the images.
        images: batch size; multiply-adds are of one image.
        repeats: of times, after one round to warm up.

    Raises:
        ConfigError: if it does not fit into memory.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    parts = find_parts(model)
    try:
        inputs = random_inputs(cfg, size, images)
        operations = count_multiply_adds(model, parts, inputs[:1])
        rounds = [_time_inference(model, parts, inputs) for _ in range(repeats + 1)][1:]
        loop = build_loop(cfg, model, inputs)
        for group in loop.optimizer.param_groups:
            group["lr"] = 0.0  # random weights may diverge
        saved = measure_saved_bytes(loop, parts)  # warms up
        steps = [_time_step(loop) for _ in range(repeats)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"--images {images} of --size {size[0]} {size[1]} do not fit into the memory of "
            f"{cfg.MODEL.DEVICE}. Write fewer or smaller ones, or another MODEL.DEVICE."
        ) from error
    costs = {
        name: PartCost(
            *counts,
            multiply_adds=round(operations.get(name, 0)),
            saved_bytes=round(saved.get(name, 0)),
            seconds=median(seconds.get(name, 0.0) for seconds, _ in rounds),
        )
        for name, counts in count_parameters(model, parts).items()
    }
    return Complexity(costs, median(total for _, total in rounds), median(steps))


@torch.inference_mode()
def _time_inference(
    model: nn.Module, parts: Mapping[str, nn.Module], inputs: list[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    """Seconds of an inference, by part and in total."""
    with amounts_by_part(parts, _now) as seconds:
        model.eval()(inputs)
    return seconds, sum(seconds.values())


def _time_step(loop: TrainLoop) -> float:
    start = _now()
    with EventStorage():
        loop.run_step()
    return _now() - start


def _now() -> float:
    """Seconds, after the GPU has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
