"""The recipe of a training as it will be run: batch, learning rate and length in final numbers."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..data.loaders import training_records
from ..solver import scale_learning_rate, use_epochs

__all__ = ["final_recipe", "keep_drawn_seed", "warn_of_few_images"]

_LOGGER = logging.getLogger(__name__)


def keep_drawn_seed(cfg: CfgNode) -> None:
    """Where ``SEED`` is drawn and a run goes on: take what was drawn at its start, in place."""
    folder = Path(cfg.OUTPUT_DIR)
    if cfg.SEED < 0 and (folder / "last_checkpoint").is_file():
        saved = folder / "config.yaml"
        if saved.is_file():
            cfg.SEED = CfgNode.load_yaml_with_base(str(saved), allow_unsafe=False)["SEED"]


def warn_of_few_images(cfg: CfgNode) -> None:
    """DPG cannot learn from batches, or parts of them, of two or three images; say so."""
    dpg = cfg.MODEL.SparseRCNN.DPG
    images = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE
    if dpg.ENABLED and dpg.LOGIT_NORM and images < _FEWEST_IMAGES:
        _LOGGER.warning(
            "DPG compares the %d images of a step (SOLVER.IMS_PER_BATCH / SOLVER.ACCUMULATE) with "
            "each other; below %d it learns little or nothing. Raise the one or lower the other, "
            "or save memory by MODEL.CHECKPOINT instead.",
            *(images, _FEWEST_IMAGES),
        )


_FEWEST_IMAGES = 4


def final_recipe(cfg: CfgNode) -> CfgNode:
    """A frozen config whose ``SOLVER`` needs no further interpretation; doing it twice is harmless.

    In this order: ``REFERENCE_WORLD_SIZE`` (Detectron2's rule: as many images per process as
    before), ``EPOCHS``, ``REFERENCE_BATCH``, a seed where ``SEED`` is below 0.

    Args:
        cfg: from `load_cfg`; not changed.

    Raises:
        ConfigError: if the numbers cannot work.
        DataError: if the data are needed to count epochs and cannot be read.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    cfg.defrost()
    # It has scaled BASE_LR with the batch, so that is meant for more images now.
    cfg.SOLVER.REFERENCE_BATCH = round(
        cfg.SOLVER.REFERENCE_BATCH * cfg.SOLVER.IMS_PER_BATCH / batch
    )
    if cfg.SOLVER.EPOCHS.MAX:
        use_epochs(cfg, len(training_records(cfg)))
    scale_learning_rate(cfg)
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed() % 2**31
        _LOGGER.info("SEED is drawn: %d.", cfg.SEED)
    cfg.freeze()
    return cfg
