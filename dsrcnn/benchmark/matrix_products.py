"""How long the multiplication of matrices alone must take: a bound that no arrangement beats."""

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["operations_of", "operations_per_second"]


def operations_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a run.

    Kernels that torch has no formula for, as fused attention on CPUs, are left out.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return int(counter.get_total_flops())


def operations_per_second(device: torch.device, *, size: int = 2048, repeats: int = 5) -> float:
    """The fastest of some products of two float32 matrices (size, size)."""
    first, second = torch.randn(2, size, size, device=device)
    product = torch.empty_like(first)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(first, second, out=product)
        product[0, 0].item()  # on a GPU: wait
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
