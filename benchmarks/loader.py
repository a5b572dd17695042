"""Images per second of the loader by augmentation, and how long training waits for them."""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from statistics import median

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from benchmarks.speed import add_config_arguments, measure_in_turn, median_ratio
from benchmarks.worker import at_least_one
from dsrcnn.config.load import load_cfg
from dsrcnn.data import build_train_loader
from dsrcnn.engine.train_loop import TrainLoop
from dsrcnn.solver import build_optimizer

_OPENCV = ("INPUT.OPENCV", "True")
_COMPOSE = ("INPUT.AUG.MOSAIC.PROB", "1.0", "INPUT.AUG.MIXUP.PROB", "0.5")
_ALBUMENTATIONS = (
    "[{'name': 'Affine', 'rotate': [-10, 10], 'scale': [0.8, 1.2], 'p': 0.5}, "
    "{'name': 'ColorJitter', 'p': 0.5}, {'name': 'CLAHE', 'p': 0.2}, {'name': 'Blur', 'p': 0.2}]"
)
PIPELINES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "plain-opencv": _OPENCV,
    "colors-warp": ("INPUT.AUG.HSV.PROB", "0.5", "INPUT.AUG.WARP.PROB", "0.5"),
    "mosaic-mixup": _COMPOSE,
    "mosaic-mixup-opencv": (*_COMPOSE, *_OPENCV),
    "albumentations": ("INPUT.AUG.ALBUMENTATIONS", _ALBUMENTATIONS),
}


def images_per_second(config: str, opts: Sequence[str], batches: int = 30) -> float:
    """Measure how fast the loader delivers training images once it runs.

    Args:
        config: YAML file or shipped name; its training data must be there.
        opts: ``KEY, VALUE, ...``.
        batches: to count.
    """
    cfg = load_cfg(config, opts)
    stream = iter(build_train_loader(cfg))
    for _ in range(_prefetched(cfg.DATALOADER.NUM_WORKERS)):
        next(stream)
    start = time.perf_counter()
    count = sum(len(batch) for batch in islice(stream, batches))
    return count / (time.perf_counter() - start)


def share_of_waiting(config: str, opts: Sequence[str], iterations: int) -> float:
    """Measure the fraction of training iterations, after some to warm up, spent waiting for data.

    Arguments are those of `images_per_second`.
    """
    cfg = load_cfg(config, opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    loop = TrainLoop.from_config(cfg, model, build_train_loader(cfg), build_optimizer(cfg, model))
    warm_up = _prefetched(cfg.DATALOADER.NUM_WORKERS)
    waited, start = 0.0, 0.0
    with EventStorage() as storage:
        for loop.iter in range(warm_up + iterations):
            if loop.iter == warm_up:
                start = time.perf_counter()
            loop.run_step()
            waited += storage.history("data_time").latest() if loop.iter >= warm_up else 0.0
    return waited / (time.perf_counter() - start)


def _prefetched(workers: int) -> int:
    """Batches that workers have fetched before the first is requested."""
    return 2 * max(1, workers) + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser)
    parser.add_argument(
        "--pipelines",
        nargs="+",
        choices=PIPELINES,
        metavar="NAME",
        default=["plain", "plain-opencv", "colors-warp", "mosaic-mixup", "albumentations"],
        help=f"of {', '.join(PIPELINES)}; ratios are to the first",
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument("--batches", type=at_least_one, default=30, help="per round (default: 30)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=0,
        help="of training, in which waiting is measured (default: 0, none)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    shared = [*args.set, "DATALOADER.NUM_WORKERS", str(args.workers)]
    opts = {name: [*shared, *PIPELINES[name]] for name in args.pipelines}
    runs = {
        name: partial(images_per_second, args.config_file, opts[name], args.batches)
        for name in opts
    }
    speeds = measure_in_turn(runs, args.repeats)
    first = speeds[args.pipelines[0]]
    rows = []
    for name, values in speeds.items():
        row = [name, f"{median(values):.1f}", f"{median_ratio(values, first):.2f}"]
        if args.iterations:
            row.append(f"{share_of_waiting(args.config_file, opts[name], args.iterations):.1%}")
        rows.append(row)
    headers = ["", "images/s", "ratio", *(["waiting"] if args.iterations else [])]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    print(f"\n{args.workers} loader processes, {args.repeats} rounds, medians\n\n{table}")
