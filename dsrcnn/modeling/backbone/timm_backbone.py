"""Networks of timm that have feature maps of strides 4, 8, 16 and 32."""

import difflib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ...errors import ConfigError, WeightsError
from .weight_packages import PREFIX, read_file, read_package

_STRIDES = (4, 8, 16, 32)
_UNLIKELY_SEED = 271_828_182  # no trained weights equal those drawn with it
_MISSING = "MODEL.TIMM needs the package timm, which is not installed: pip install 'dsrcnn[timm]'."


class TimmBackbone(Backbone):
    """``res2`` to ``res5`` of a network of timm; a `SplitBackbone`.

    Of several feature maps with the same stride it returns the deepest. Maps have the channels
    first, also of channels-last networks such as Swin; networks with windows take any image size.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str = "",
        norm: str = "",
        drop_path: float = 0.0,
        freeze_at: int = 0,
    ) -> None:
        """Build the network without its classifier.

        Args:
            name: timm's, such as ``resnet50`` or ``swin_tiny_patch4_window7_224``.
            pretrained: load timm's weights, from its cache or a download.
            weights: local file of timm's weights instead (``.pth``, ``.safetensors``), or
                ``package:<name>``, see `read_package`.
            norm: replacement of batch norms: ``FrozenBN``, ``SyncBN``, ``GN`` (32 groups, or the
                most that divide the channels); "" for none.
            drop_path: rate of stochastic depth.
            freeze_at: number of frozen parts, from the stem (1) to ``res5`` (5); their norms use
                stored statistics.

        Raises:
            ConfigError: if timm or a package of weights is missing, timm has no such network, or
                the network lacks a stride or an option.
            WeightsError: if the weights cannot be loaded.
        """
        super().__init__()
        options: dict[str, Any] = {"features_only": True}
        if drop_path:
            options["drop_path_rate"] = drop_path
        indices, any_size = _choose_levels(name, options)
        options |= {"out_indices": indices, **any_size}
        if weights:
            self.body = create_from_file(name, options, weights)
        else:
            self.body = create_network(name, {"pretrained": pretrained, **options})
        info = self.body.feature_info
        self.name = name
        self._channels = list(info.channels())
        self._channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        self._freeze(freeze_at)
        self._replace_norms(norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), sides multiples of 32, to ``res2`` ... ``res5``, (B, C, H / s, W / s)."""
        maps = self.body(images)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return {f"res{i}": x for i, x in enumerate(maps, start=2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides by name."""
        shapes = zip(self._channels, _STRIDES, strict=True)
        return {f"res{i}": ShapeSpec(channels=c, stride=s) for i, (c, s) in enumerate(shapes, 2)}

    @property
    def size_divisibility(self) -> int:
        """Divisor that the sides of images need."""
        return _STRIDES[-1]

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each part, split after every feature map.

        The stem is everything before the module that computes ``res2``.

        Raises:
            ConfigError: if timm does not know where the parts end.
        """
        names = self.body.feature_info.module_name()
        ends = [name.replace(".", "_") for name in names]
        parts: list[list[nn.Module]] = [[], []]
        for name, unit in _units(self.body, {n.split(".")[0] for n in names if "." in n}):
            if name == ends[0]:
                parts[0], parts[1] = parts[1], [unit]
            else:
                parts[-1].append(unit)
            if name in ends[:-1]:
                parts.append([])
        if len(parts) != len(_STRIDES) + 1 or not parts[-1]:
            raise ConfigError(
                f"MODEL.TIMM.NAME {self.name!r} does not tell which layers give which feature map, "
                "so that they cannot be frozen or have learning rates of their own. Write "
                "MODEL.BACKBONE.FREEZE_AT 0 and SOLVER.LAYER_DECAY 1.0."
            )
        return parts

    def _freeze(self, count: int) -> None:
        from timm.layers import freeze_batch_norm_2d

        if count <= 0:
            return
        units = list(chain(*self.parts()[:count]))
        frozen = {id(module) for unit in units for module in unit.modules()}
        for unit in units:
            unit.requires_grad_(False)
        for parent in list(self.body.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in frozen and isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, freeze_batch_norm_2d(child))

    def _replace_norms(self, norm: str) -> None:
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        kinds = {type(module).__name__ for module in self.body.modules()}
        has_frozen = any(kind.startswith("FrozenBatchNorm") for kind in kinds)  # by FREEZE_AT
        has_norms = any(isinstance(m, nn.BatchNorm2d) for m in self.body.modules())
        if norm and not (has_norms or has_frozen):
            raise ConfigError(
                f"MODEL.TIMM.NORM is {norm!r}, but {self.name!r} has no batch norms to replace. "
                'Write MODEL.TIMM.NORM "".'
            )
        if norm == "GN":
            _use_group_norms(self.body)
        elif norm == "FrozenBN":
            self.body = freeze_batch_norm_2d(self.body)
        elif norm == "SyncBN":
            self.body = convert_sync_batchnorm(self.body)


def _units(body: nn.Module, containers: set[str]) -> list[tuple[str, nn.Module]]:
    """Name the modules of a network in order; `containers` of feature maps are expanded."""
    units = []
    for name, child in body.named_children():
        if name in containers and isinstance(child, nn.Sequential):
            units += [(f"{name}_{inner}", part) for inner, part in child.named_children()]
        else:
            units.append((name, child))
    return units


def _choose_levels(name: str, options: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Find the deepest feature map of every stride, and options for images of any size."""
    any_size: dict[str, Any] = {"strict_img_size": False}
    with torch.device("meta"):  # only for its description
        try:
            body = create_network(name, {**options, **any_size}, report=False)
        except TypeError:  # most networks have no fixed size
            any_size = {}
            body = create_network(name, options)
    reductions = list(body.feature_info.reduction())
    missing = [stride for stride in _STRIDES if stride not in reductions]
    if missing:
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, whose feature maps have strides {reductions}; "
            f"{_STRIDES} are needed. Choose a network with a pyramid, such as resnet50, "
            "convnext_tiny or swin_tiny_patch4_window7_224."
        )
    last = len(reductions) - 1
    return [last - reductions[::-1].index(stride) for stride in _STRIDES], any_size


def create_from_file(name: str, options: dict[str, Any], path: str) -> Any:
    """Load timm's weights from a file; weights that do not fit are an error, unlike in timm."""
    overlay: dict[str, Any] = {"file": path}  # other formats are timm's alone
    if path.startswith(PREFIX):
        overlay = {"state_dict": read_package(path, name, create_network(name, {}).state_dict())}
    elif not path.endswith(".npz") or not os.path.isfile(path):
        overlay = {"state_dict": read_file(path)}
    file = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    # timm warns of the classifier, which is never needed; what is missing is checked below.
    with torch.random.fork_rng(devices=[]), _quiet(logging.getLogger("timm")):
        bodies = []
        for source in (file, {}):
            torch.manual_seed(_UNLIKELY_SEED)
            bodies.append(create_network(name, {**options, **source}))
    loaded, random = (dict(body.named_parameters()) for body in bodies)
    same = [k for k, v in loaded.items() if v.ndim > 1 and v.std() > 0 and v.equal(random[k])]
    if same:
        raise WeightsError(
            f"MODEL.TIMM.WEIGHTS {path!r} do not fit {name!r}: they lack {len(same)} of its "
            f"tensors, such as {same[0]}. Write the file of this network."
        )
    return bodies[0]


def create_network(name: str, options: dict[str, Any], *, report: bool = True) -> Any:
    """Build a network of timm; without `report` a `TypeError` about its options is passed on.

    Raises:
        ConfigError: if timm is missing, does not know the network or cannot build it.
        WeightsError: if weights cannot be loaded.
    """
    timm = _import_timm(name)
    overlay = options.get("pretrained_cfg_overlay", {})
    file = overlay.get("file", "given" if overlay else None)
    try:
        return timm.create_model(name, **options)
    except OSError as error:
        raise WeightsError(
            f"Weights of {name!r} cannot be loaded ({file or 'timm tried its cache and a download'}"
            f": {type(error).__name__}). Write MODEL.TIMM.WEIGHTS <file>, or MODEL.TIMM.PRETRAINED "
            "False to start from random ones."
        ) from error
    except Exception as error:  # its many networks and readers of weights raise anything
        if not report and isinstance(error, TypeError):
            raise
        if file:
            raise WeightsError(
                f"MODEL.TIMM.WEIGHTS {file!r} do not fit {name!r}: {type(error).__name__}: {error}"
            ) from error
        if options.get("pretrained"):
            raise WeightsError(
                f"timm has no weights of {name!r} ({error}). Write MODEL.TIMM.WEIGHTS <file>, or "
                "MODEL.TIMM.PRETRAINED False to start from random ones."
            ) from error
        raise ConfigError(
            f"MODEL.TIMM.NAME {name!r} cannot be built as a pyramid, or does not take "
            f"MODEL.TIMM.DROP_PATH ({type(error).__name__}: {error}). Choose another network, or "
            "MODEL.TIMM.DROP_PATH 0.0."
        ) from error


def _use_group_norms(body: nn.Module) -> None:
    """Replace batch norms in place; timm's norms with an activation keep it."""
    for parent in list(body.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                channels = norm.num_features
                new: nn.Module = nn.GroupNorm(math.gcd(32, channels), channels, eps=norm.eps)
                new.load_state_dict({"weight": norm.weight, "bias": norm.bias})
                rest = [getattr(norm, part, nn.Identity()) for part in ("drop", "act")]
                rest = [part for part in rest if not isinstance(part, nn.Identity)]
                setattr(parent, name, nn.Sequential(new, *rest) if rest else new)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Suppress a logger's warnings inside."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def freeze_norms_of_timm(module: nn.Module) -> nn.Module:
    """Freeze timm's batch norms, whose activations Detectron2's conversion would drop."""
    modules = [m for m in module.modules() if type(m).__module__.startswith("timm.")]
    # Timm's synchronized norms with an activation are no `BatchNorm2d`.
    if any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in modules):
        from timm.layers import freeze_batch_norm_2d

        return freeze_batch_norm_2d(module)
    return module


def pixel_statistics(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of RGB in 0 to 255 that a network was trained with."""
    timm = _import_timm(name)
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return [255.0 * x for x in config.mean], [255.0 * x for x in config.std]


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know. "
            f"Close names: {', '.join(close) or 'none'}."
        )
    return timm
