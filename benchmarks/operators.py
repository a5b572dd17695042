"""Operators that one image dispatches in evaluation, by place: launches, without a GPU."""

import argparse
import traceback
from collections import Counter
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import add_config_arguments
from benchmarks.worker import at_least_one
from dsrcnn.config.load import load_cfg

_VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "detach", "diagonal"),
    *("expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t"),
    *("transpose", "unbind", "unfold", "unsqueeze"),
}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE = _VIEWS | _ALLOCATIONS


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


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        for root in ("/dsrcnn/", "/detectron2/"):
            if root in path:
                return f"{root[1:]}{path.rpartition(root)[2]} {frame.name}"
    return "elsewhere"


def count_operators(
    config: str, opts: list[str], *, height: int, width: int, half: bool = False
) -> OperatorCount:
    """Count the operators of one image in evaluation, at the second pass.

    With `half` under autocast with bfloat16, whose copies of the weights are kept.
    """
    cfg = load_cfg(config, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *opts])
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    inputs = [{"image": image, "height": height, "width": width}]
    # Inference mode would hide what composite operators consist of.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(inputs)
        with OperatorCount() as count:
            model(inputs)
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser)
    parser.add_argument("--bf16", action="store_true", help="under autocast with bfloat16")
    parser.add_argument("--size", type=at_least_one, nargs=2, default=[256, 320], metavar="N")


def run(args: argparse.Namespace) -> None:
    """Print the counts by place and by name."""
    height, width = args.size
    count = count_operators(args.config_file, args.set, height=height, width=width, half=args.bf16)
    for title, counter in (("place", count.by_place), ("operator", count.by_name)):
        print(tabulate(counter.most_common(), [title, "operators"], tablefmt="pipe"), "\n")
    print(f"{count.total} operators, {count.casts} of them conversions")
