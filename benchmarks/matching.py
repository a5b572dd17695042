"""Time the batched matcher of DLA against the plain loop, in one run."""

import time
from collections.abc import Callable
from statistics import median

import torch
from tabulate import tabulate

from benchmarks.reference_matching import assign_by_loop
from dsrcnn.errors import ConfigError
from dsrcnn.modeling.matching import (
    CostSettings,
    HungarianMatcher,
    OptimalTransportMatcher,
    UnitRule,
)
from dsrcnn.structures import Predictions, Targets

__all__ = ["compare_matchers", "make_scene"]


def make_scene(
    stages: int, images: int, proposals: int, objects: int, classes: int, device: torch.device
) -> tuple[Predictions, Targets]:
    """Predictions as of a trained model: proposals scatter around the objects they have found."""
    g = torch.Generator().manual_seed(0)
    size = torch.tensor([640.0, 480.0])
    corner = torch.rand(images, objects, 2, generator=g) * size * 0.7
    extent = (0.05 + 0.25 * torch.rand(images, objects, 2, generator=g)) * size
    wanted = torch.cat([corner, corner + extent], dim=-1)
    labels = torch.randint(classes, (images, objects), generator=g)
    index = torch.arange(proposals) % objects
    spread = torch.linspace(0, 1, proposals).view(-1, 1)
    noise = torch.randn(stages, images, proposals, 4, generator=g) * 0.3 * spread
    boxes = wanted[:, index] + noise * extent[:, index].repeat(1, 1, 2)
    logits = torch.randn(stages, images, proposals, classes, generator=g) - 4.6
    strength = (4 - 4 * spread).expand(stages, images, proposals, 1)
    learned = labels[:, index].expand(stages, images, proposals).unsqueeze(-1)
    logits = logits.scatter_add(-1, learned, strength)
    mask = torch.ones(images, objects, dtype=torch.bool)
    sizes = size.repeat(2).expand(images, 4)
    predictions = Predictions(logits.to(device), boxes.to(device), torch.arange(stages).to(device))
    return predictions, Targets(*(x.to(device) for x in (wanted, labels, mask, sizes)))


def compare_matchers(
    *,
    stages: int = 6,
    images: int = 2,
    proposals: int = 300,
    objects: int = 20,
    classes: int = 80,
    repeats: int = 15,
) -> str:
    """Measure in turn: batched transport, the plain loop, Hungarian matching.

    Args:
        stages: prediction sets.
        images: of the batch.
        proposals: per image.
        objects: per image.
        classes: of the logits.
        repeats: rounds.

    Returns:
        A table of median milliseconds, with the factor against the loop as the median of rounds.

    Raises:
        ConfigError: if a number is below 1.
        AssertionError: if batched matcher and loop disagree.
    """
    counts = {"stages": stages, "images": images, "proposals": proposals, "objects": objects}
    for name, value in {**counts, "classes": classes, "repeats": repeats}.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; write a number of at least 1.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictions, targets = make_scene(stages, images, proposals, objects, classes, device)
    rule = UnitRule(num_stages=stages)
    transport = OptimalTransportMatcher(costs=CostSettings(), units=rule)
    hungarian = HungarianMatcher(costs=CostSettings())
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "transport, batched": lambda: transport(predictions, targets),
        "transport, loop": lambda: assign_by_loop(predictions, targets, rule),
        "Hungarian": lambda: hungarian(predictions, targets),
    }
    batched, loop, _ = (run() for run in runs.values())  # warms up as well
    differing = int((batched != loop).sum())
    if differing > 0.001 * batched.numel():
        raise AssertionError(f"Batched matcher and loop disagree about {differing} proposals.")
    rounds = [{name: _milliseconds(run) for name, run in runs.items()} for _ in range(repeats)]
    rows = [
        [
            name,
            median(r[name] for r in rounds),
            median(r["transport, loop"] / r[name] for r in rounds),
        ]
        for name in runs
    ]
    return tabulate(
        rows, headers=["matcher", "ms", "loop / this"], floatfmt=("", ".1f", ".1f"), tablefmt="pipe"
    )


def _milliseconds(run: Callable[[], torch.Tensor]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return 1000 * (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
