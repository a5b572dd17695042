"""How fast training images are loaded, by what happens to them, and whether training waits."""

import itertools
import time
from collections.abc import Sequence
from statistics import median

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from tqdm import tqdm

from dsrcnn.config.load import load_cfg
from dsrcnn.data import build_train_loader
from dsrcnn.engine.train_loop import TrainLoop
from dsrcnn.solver import build_optimizer

__all__ = ["PIPELINES", "compare_pipelines", "images_per_second", "share_of_waiting"]

_ALBUMENTATIONS = (
    "[{'name': 'Affine', 'rotate': [-10, 10], 'scale': [0.8, 1.2], 'p': 0.5}, "
    "{'name': 'ColorJitter', 'p': 0.5}, {'name': 'CLAHE', 'p': 0.2}, {'name': 'Blur', 'p': 0.2}]"
)
PIPELINES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "plain-opencv": ("INPUT.OPENCV", "True"),
    "colours-warp": ("INPUT.AUG.HSV.PROB", "0.5", "INPUT.AUG.WARP.PROB", "0.5"),
    "mosaic-mixup": ("INPUT.AUG.MOSAIC.PROB", "1.0", "INPUT.AUG.MIXUP.PROB", "0.5"),
    "mosaic-mixup-opencv": (
        *("INPUT.AUG.MOSAIC.PROB", "1.0", "INPUT.AUG.MIXUP.PROB", "0.5"),
        *("INPUT.OPENCV", "True"),
    ),
    "albumentations": ("INPUT.AUG.ALBUMENTATIONS", _ALBUMENTATIONS),
}


def compare_pipelines(
    config: str,
    names: Sequence[str],
    opts: Sequence[str] = (),
    *,
    batches: int = 30,
    repeats: int = 3,
    iterations: int = 0,
) -> str:
    """A table of images per second, measured in turn, and of how long training waits for them.

    Args:
        config: YAML file or shipped name; its training data must be there.
        names: of `PIPELINES`; ratios are to the first.
        opts: ``KEY, VALUE, ...`` for all.
        batches: counted in a round.
        repeats: rounds.
        iterations: of training in which waiting is measured; 0 for not.
    """
    speeds: dict[str, list[float]] = {name: [] for name in names}
    rounds = [name for _ in range(repeats) for name in names]
    for name in tqdm(rounds, desc="loading"):
        speeds[name].append(images_per_second(config, [*opts, *PIPELINES[name]], batches))
    headers = ["", "images/s", "ratio", *(["waiting"] if iterations else [])]
    rows = []
    for name in names:
        pairs = zip(speeds[name], speeds[names[0]], strict=True)
        row = [name, f"{median(speeds[name]):.1f}", f"{median(a / b for a, b in pairs):.2f}"]
        if iterations:
            row.append(f"{share_of_waiting(config, [*opts, *PIPELINES[name]], iterations):.1%}")
        rows.append(row)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def images_per_second(config: str, opts: Sequence[str], batches: int = 30) -> float:
    """How fast the loader of a config delivers training images, once it runs.

    Args:
        config: YAML file or shipped name; its training data must be there.
        opts: ``KEY, VALUE, ...``.
        batches: to count.
    """
    cfg = load_cfg(config, opts)
    stream = iter(build_train_loader(cfg))
    for _ in range(_ahead(cfg.DATALOADER.NUM_WORKERS)):
        next(stream)
    start = time.perf_counter()
    count = sum(len(batch) for batch in itertools.islice(stream, batches))
    return count / (time.perf_counter() - start)


def share_of_waiting(config: str, opts: Sequence[str], iterations: int) -> float:
    """The part of the time of training iterations that passes until their batch is there.

    Args:
        config: YAML file or shipped name; its training data must be there.
        opts: ``KEY, VALUE, ...``.
        iterations: to measure, after some that are not.
    """
    cfg = load_cfg(config, opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    loop = TrainLoop.from_config(cfg, model, build_train_loader(cfg), build_optimizer(cfg, model))
    warm_up = _ahead(cfg.DATALOADER.NUM_WORKERS)
    waited, start = 0.0, 0.0
    with EventStorage() as storage:
        for loop.iter in range(warm_up + iterations):
            if loop.iter == warm_up:
                start = time.perf_counter()
            loop.run_step()
            waited += storage.history("data_time").latest() if loop.iter >= warm_up else 0.0
    return waited / (time.perf_counter() - start)


def _ahead(workers: int) -> int:
    """Batches that workers have fetched before the first is asked for."""
    return 2 * max(1, workers) + 1
