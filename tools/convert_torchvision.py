#!/usr/bin/env python
"""Convert a torchvision ResNet checkpoint to a file for ``MODEL.WEIGHTS``.

python tools/convert_torchvision.py resnet101.pth torchvision-R-101.pkl
"""

import argparse
import pickle
import re
from pathlib import Path

import torch


def detectron2_key(key: str) -> str:
    """Detectron2's name of a parameter of torchvision's ResNet."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


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
