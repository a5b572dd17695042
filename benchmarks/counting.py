"""Count and time the operators that a call dispatches.

The worker of a measurement imports this file by its folder: it must not import ``dsrcnn``.
"""

import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "detach", "diagonal"),
    *("expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t"),
    *("transpose", "unbind", "unfold", "unsqueeze"),
}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE = _VIEWS | _ALLOCATIONS
_PRODUCTS = {"convolution", "addmm", "mm", "bmm", "baddbmm", "linear"}


def now() -> float:
    """Seconds, after the device has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class OperatorCount(TorchDispatchMode):
    """Counts the operators that run inside of it, without views and allocations.

    Attributes:
        by_name: of the operators.
        by_place: innermost function of the repository or of Detectron2 that called them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.by_place: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator."""
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.by_name[name] += 1
            self.by_place[_place()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def casts(self) -> int:
        """Number of conversions of type or device."""
        return self.by_name["_to_copy"]

    @property
    def total(self) -> int:
        """Number of operators."""
        return sum(self.by_name.values())


class _Products(TorchDispatchMode):
    """Records the convolutions and matrix products that run inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and record it if it is a product."""
        if func.overloadpacket.__name__ in _PRODUCTS:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        for root in ("/dsrcnn/", "/detectron2/"):
            if root in path:
                return f"{root[1:]}{path.rpartition(root)[2]} {frame.name}"
    return "elsewhere"


def count(run: Callable[[], object], *, on_gpu: bool) -> dict[str, float]:
    """Count what one call starts: operators, or on a GPU launches, copies and waits."""
    for _ in range(2):
        run()
    if not on_gpu:
        with OperatorCount() as counted:
            run()
        return {"operators": counted.total, "conversions": counted.casts}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    calls = {event.key: event.count for event in profiler.key_averages()}
    # Of the runtime and of the driver; a graph is one launch.
    kinds = {"launches": ("LaunchKernel", "GraphLaunch"), "copies": ("Memcpy",)}
    kinds["waits"] = ("Synchronize",)
    return {
        kind: sum(
            n for key, n in calls.items() if key.startswith("cu") and any(w in key for w in words)
        )
        for kind, words in kinds.items()
    }


def products_alone(run: Callable[[], object]) -> float:
    """Seconds of the convolutions and matrix products of one call, run again one by one: a limit.

    The median of three rounds.
    """
    with _Products() as recorded:
        run()
    rounds = []
    for _ in range(3):
        start = now()
        for call in recorded.calls:
            call()
        rounds.append(now() - start)
    return sorted(rounds)[1]
