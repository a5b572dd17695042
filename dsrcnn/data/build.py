"""Loaders for training, evaluation and validation losses."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
    trivial_batch_collator,
)
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from ..errors import ConfigError, DataError, DsrcnnError
from .buckets import bucket_groups, orientation_groups
from .datasets.coco import is_checked, is_plain_coco, load_checked_coco_json
from .datasets.custom import check_registered, class_names
from .datasets.validate import check_custom_records, check_learnable, warn_once
from .files import is_file
from .mapper import DetectionMapper
from .samplers import TrainingBatches
from .transforms.mosaic import MixDataset
from .workers import ImageLoader

_TEST_IMAGES: dict[str, frozenset[str]] = {}  # file names by the test sets that were read


def build_train_loader(cfg: CfgNode) -> ImageLoader:
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
    if cfg.INPUT.BUCKETS:
        groups = bucket_groups(cfg, records)
    elif cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = orientation_groups(cfg, records)
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
    return ImageLoader(
        MixDataset(cfg, DatasetFromList(records, copy=False), mapper),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
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
    names = cfg.DATASETS.TRAIN
    records = [r for name in names for r in load_records(name, for_training=True)]
    _warn_of_test_images(cfg, records)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_images_with_only_crowd_annotations(records)
    classes = class_names(names[0])
    if classes and all(class_names(name) == classes for name in names):
        print_instances_class_histogram(records, classes)
    return records


def _warn_of_test_images(cfg: CfgNode, records: list[dict[str, Any]]) -> None:
    """Warn of training images that are in a test set; those not read yet are left out."""
    used = {str(record["file_name"]) for record in records}
    for name in cfg.DATASETS.TEST:
        if shared := sorted(used & _TEST_IMAGES.get(name, frozenset())):
            what = f"{len(shared)} images are training images, too (image in two splits)"
            warn_once(f"Test set {name}", what, shared)


def load_records(
    name: str, *, for_training: bool, find_images: bool = True
) -> list[dict[str, Any]]:
    """Load the records of a registered dataset and check them.

    Training needs objects to learn; evaluation needs different values of ``image_id``. With
    `find_images`, the image files must exist.

    Raises:
        DataError: if the dataset is not registered, missing on disk or unusable.
    """
    records = _load_records(name, for_training, find_images)
    if not for_training:
        _TEST_IMAGES[name] = frozenset(str(record["file_name"]) for record in records)
    return records


def _load_records(name: str, for_training: bool, find_images: bool) -> list[dict[str, Any]]:
    with explain_data_errors(name):
        metadata = MetadataCatalog.get(name)
        file, images = metadata.get("json_file"), metadata.get("image_root")
        if is_plain_coco(name) and is_file(file):  # boxes must not depend on their polygons
            return load_checked_coco_json(file, images or "", name, labeled=for_training)
        records = DatasetCatalog.get(name)
    classes = class_names(name)
    if not is_checked(name):
        count = None if classes is None else len(classes)
        options = {"for_training": for_training, "find_images": find_images}
        return check_custom_records(records, name, count, **options)
    if for_training:
        check_learnable(records, f"Dataset {name!r}" + (f" ({file})" if file else ""))
    return records


def _build_order(cfg: CfgNode, records: list[dict[str, Any]]) -> Callable[[int], Iterator[int]]:
    """Return the endless order of ``DATALOADER.SAMPLER_TRAIN`` as a function of the seed."""
    node = cfg.DATALOADER
    repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    # Detectron2 0.6 always takes the root, and has no key for it.
    root = {"sqrt": node.REPEAT_SQRT} if "REPEAT_SQRT" in node else {}
    samplers: dict[str, Callable[[int], Any]] = {
        "TrainingSampler": lambda seed: TrainingSampler(len(records), seed=seed),
        "RepeatFactorTrainingSampler": lambda seed: RepeatFactorTrainingSampler(
            repeat_factors(records, node.REPEAT_THRESHOLD, **root), seed=seed
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


def build_test_loader(cfg: CfgNode, name: str) -> ImageLoader:
    """Build a loader for one pass over dataset `name`, without annotations.

    Raises:
        DataError: if the dataset is not registered, missing on disk or empty.
    """
    records = load_records(name, for_training=False)
    return _build_test_loader(cfg, records, DetectionMapper(cfg, is_train=False))


def build_validation_loader(cfg: CfgNode, name: str) -> Any:
    """Build a loader like `build_test_loader`, with its errors, plus annotations for losses.

    Returns:
        The loader; an empty list for a dataset without labels, whose losses mean nothing.
    """
    mapper = DetectionMapper(cfg, is_train=False, keep_annotations=True)
    records = load_records(name, for_training=False)
    is_labeled = any(record["annotations"] for record in records)
    return _build_test_loader(cfg, records, mapper) if is_labeled else []


class _TestImages(MapDataset):
    """Images of a test set, as a class of this package; see `ImageLoader`."""


def _build_test_loader(
    cfg: CfgNode, records: list[dict[str, Any]], mapper: DetectionMapper
) -> ImageLoader:
    """Load this process's part of the images one by one, as `build_detection_test_loader` does."""
    return ImageLoader(
        _TestImages(DatasetFromList(records, copy=False), mapper),
        sampler=InferenceSampler(len(records)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )


@contextmanager
def explain_data_errors(*names: str) -> Iterator[None]:
    """Convert errors of the functions of the datasets `names` to a `DataError` with advice."""
    for name in names:
        check_registered(name)
    joined = ", ".join(names)
    try:
        yield
    except DsrcnnError:
        raise
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
    except Exception as error:  # the function may be anybody's
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"Dataset {joined} cannot be used: its function raises {text} "
            f"({place.filename}, line {place.lineno}); correct it or the annotations."
        ) from error
