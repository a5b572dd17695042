#!/usr/bin/env python
"""Convert a torchvision ResNet checkpoint to a file for ``MODEL.WEIGHTS``.

python tools/convert_torchvision.py resnet101.pth torchvision-R-101.pkl
"""

import argparse
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch


def detectron2_key(key: str) -> str:
    """Detectron2's name of a parameter of torchvision's ResNet."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def rename_all(
    state: dict[str, torch.Tensor], our_key: Callable[[str], str | None]
) -> dict[str, torch.Tensor]:
    """A state dict under our names.

    Args:
        state: under theirs.
        our_key: our name of one of theirs, None for what is not needed; a KeyError for a stranger.

    Raises:
        KeyError: naming a parameter that is unknown, and how many there are.
    """
    found, unknown = {}, []
    for key, value in state.items():
        try:
            name = our_key(key)
        except KeyError:
            unknown.append(key)
            continue
        if name is not None:
            found[name] = value
    if unknown:
        raise KeyError(f"{len(unknown)} unknown parameters, such as {unknown[0]}")
    return found


def main() -> None:
    """Read, rename, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="state dict as torchvision publishes it")
    parser.add_argument("target", type=Path, help="pickle to write")
    args = parser.parse_args()
    state = torch.load(args.source, map_location="cpu", weights_only=True)
    model = {
        detectron2_key(k): v.numpy()
        for k, v in state.items()
        if not k.endswith("num_batches_tracked")
    }
    content = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    args.target.write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
