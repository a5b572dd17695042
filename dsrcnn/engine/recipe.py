"""The recipe of a training as it will be run: batch, learning rate and length in final numbers."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..data.loaders import training_records
from ..solver import scale_learning_rate, use_epochs

__all__ = ["final_recipe"]

_LOGGER = logging.getLogger(__name__)


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
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    cfg.defrost()
    if cfg.SOLVER.EPOCHS.MAX:
        use_epochs(cfg, len(training_records(cfg)))
    scale_learning_rate(cfg)
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed() % 2**31
        _LOGGER.info("SEED is drawn: %d.", cfg.SEED)
    cfg.freeze()
    return cfg
