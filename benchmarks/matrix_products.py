"""How many operations the matrix products of a run are, and how many a device does in a second."""

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


def operations_per_second(device: torch.device, *, size: int | None = None) -> float:
    """How fast a device multiplies large matrices: the best of five rounds after one to warm up.

    Args:
        device: to measure.
        size: of the two square float32 matrices; None: 2048 on CPUs, and 8192 on GPUs, where a
            small product would be over before the call for it is.

    Returns:
        Floating-point operations a second.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    first, second = torch.randn(2, size, size, device=device)
    product = torch.empty_like(first)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(first, second, out=product)
        product[0, 0].item()  # on a GPU: wait
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
