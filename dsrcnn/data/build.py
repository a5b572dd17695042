"""Loaders for training, evaluation and validation losses."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..errors import ConfigError, DataError
from .datasets.custom import check_registered
from .mapper import DetectionMapper
from .samplers import TrainingBatches
from .transforms.mosaic import MixDataset


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Build the endless loader over ``DATASETS.TRAIN``.

    Its ``batch_sampler`` is a `TrainingBatches`, whose seed and start may be changed until the
    first batch is loaded. A negative ``SEED`` draws a seed.

    Raises:
        ConfigError: if the batch cannot be divided among processes and ``SOLVER.ACCUMULATE``.
        DataError: if a dataset is not registered, missing on disk or without usable boxes.
    """
    world_size, parts = comm.get_world_size(), cfg.SOLVER.ACCUMULATE
    if cfg.SOLVER.IMS_PER_BATCH % (world_size * parts):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, the images of all processes in "
            f"one iteration. It must be a multiple of {world_size * parts}: {world_size} processes "
            f"times SOLVER.ACCUMULATE {parts}."
        )
    records = training_records(cfg)
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [int(r.get("width", 1) > r.get("height", 1)) for r in records]
    batches = TrainingBatches(
        _build_order(cfg, records),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        groups=groups,
        rank=comm.get_rank(),
        world_size=world_size,
        mix_until=cfg.SOLVER.MAX_ITER * (1 - cfg.INPUT.AUG.PLAIN_END),
    )
    mapper = DetectionMapper(cfg, is_train=True)
    return DataLoader(
        MixDataset(cfg, DatasetFromList(records, copy=False), mapper),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_set_up_worker,
    )


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Load the records of ``DATASETS.TRAIN``, in Detectron2's format.

    Raises:
        DataError: if a dataset is not registered, missing on disk or without usable boxes.
    """
    if not cfg.DATASETS.TRAIN:
        raise DataError(
            "DATASETS.TRAIN is empty. Write a registered name, such as shapes_train, or set "
            "DATASETS.CUSTOM.FOLDER."
        )
    with explain_data_errors(*cfg.DATASETS.TRAIN):
        filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        return get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty)


def _build_order(cfg: CfgNode, records: list[dict[str, Any]]) -> Callable[[int], Iterator[int]]:
    """Return the endless order of ``DATALOADER.SAMPLER_TRAIN`` as a function of the seed."""
    node = cfg.DATALOADER
    repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    samplers: dict[str, Callable[[int], Any]] = {
        "TrainingSampler": lambda seed: TrainingSampler(len(records), seed=seed),
        "RepeatFactorTrainingSampler": lambda seed: RepeatFactorTrainingSampler(
            repeat_factors(records, node.REPEAT_THRESHOLD), seed=seed
        ),
    }
    if "RANDOM_SUBSET_RATIO" in node:  # Detectron2 0.6 has the sampler without this key
        samplers["RandomSubsetTrainingSampler"] = lambda seed: RandomSubsetTrainingSampler(
            len(records), node.RANDOM_SUBSET_RATIO, seed_shuffle=seed, seed_subset=seed
        )
    if node.SAMPLER_TRAIN not in samplers:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is {node.SAMPLER_TRAIN!r}; write one of "
            f"{', '.join(samplers)}."
        )
    # Iterating over the sampler itself would yield the part of one process only.
    return lambda seed: samplers[node.SAMPLER_TRAIN](seed)._infinite_indices()


def _set_up_worker(worker: int) -> None:
    """Keep OpenCV single-threaded, since workers already use all cores, and ignore Ctrl-C.

    The process that trains ends its workers.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)  # 1 would wait for threads of the parent, which a fork does not copy


def build_test_loader(cfg: CfgNode, name: str) -> Any:
    """Build a loader for one pass over dataset `name`, without annotations.

    Raises:
        DataError: if the dataset is not registered, missing on disk or empty.
    """
    with explain_data_errors(name):
        return build_detection_test_loader(cfg, name, mapper=DetectionMapper(cfg, is_train=False))


def build_validation_loader(cfg: CfgNode, name: str) -> Any:
    """Build a loader like `build_test_loader`, with its errors, plus annotations for losses."""
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    with explain_data_errors(name):
        return build_detection_test_loader(cfg, name, mapper=mapper)


@contextmanager
def explain_data_errors(*names: str) -> Iterator[None]:
    """Convert Detectron2's errors about the datasets `names` to a `DataError` with advice."""
    for name in names:
        check_registered(name)
    joined = ", ".join(names)
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"Dataset {joined} is not on this machine: {error.filename} does not exist. Put it "
            "where datasets/README.md says, or set DETECTRON2_DATASETS to its parent folder."
        ) from error
    except ModuleNotFoundError as error:
        raise DataError(
            f"Dataset {joined} needs the package {error.name}, which is not installed: "
            f"pip install --no-deps {error.name}"
        ) from error
    except AssertionError as error:
        raise DataError(f"Dataset {joined} cannot be used: {error}") from error
