"""Precision of float32 products and convolutions on GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT = "ieee"


def _holders() -> tuple[Any, ...]:
    """Objects with torch's settings by operator, from torch 2.9 on; none before.

    The earlier settings raise an error where a program has used these.
    """
    holders = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None))
    return holders if all(hasattr(holder, "fp32_precision") for holder in holders) else ()


def float32_precision() -> tuple[str, str]:
    """Precision of float32 matrix products and of convolutions, in torch's words."""
    if holders := _holders():
        return holders[0].fp32_precision, holders[1].fp32_precision
    return torch.get_float32_matmul_precision(), str(torch.backends.cudnn.allow_tf32)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TF32, with which a GPU rounds the inputs of convolutions to 11 bits."""
    if holders := _holders():
        before = [holder.fp32_precision for holder in holders]
        for holder in holders:
            holder.fp32_precision = _EXACT
        try:
            yield
        finally:
            for holder, value in zip(holders, before, strict=True):
                holder.fp32_precision = value
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
