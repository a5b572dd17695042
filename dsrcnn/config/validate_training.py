"""Checks of what a config says about training."""

from detectron2.config import CfgNode

from ..errors import ConfigError

__all__ = ["check_training", "expect_one_of"]


def check_training(cfg: CfgNode) -> None:
    """Reject values of ``SOLVER``, ``MODEL.EMA``, ``TEST`` and ``LOG`` that cannot work.

    Raises:
        ConfigError: naming key, value found and value expected.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    expect_one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, "full_model", "norm", "value")
    expect_one_of("SOLVER.OPTIMIZER", solver.OPTIMIZER, "ADAMW", "SGD")
    expect_one_of("SOLVER.AMP.PRECISION", solver.AMP.PRECISION, "bf16", "fp16")
    schedules = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupCosineRestartsLR")
    expect_one_of("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, *schedules)
    for name in solver.NO_DECAY:
        expect_one_of("SOLVER.NO_DECAY", name, "norm", "bias", "embedding")
    _expect_between("SOLVER.LAYER_DECAY", solver.LAYER_DECAY, 0.0, 1.0)
    _expect_between("MODEL.EMA.DECAY", cfg.MODEL.EMA.DECAY, 0.0, 1.0)
    expect_one_of("TEST.BEST.MODE", cfg.TEST.BEST.MODE, "max", "min")
    for key, value, least in (
        ("SOLVER.ACCUMULATE", solver.ACCUMULATE, 1),
        ("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, 1),
        ("SOLVER.REFERENCE_BATCH", solver.REFERENCE_BATCH, 0),
        ("TEST.BEST.PATIENCE", cfg.TEST.BEST.PATIENCE, 0),
        ("LOG.IMAGES", cfg.LOG.IMAGES, 0),
        *((f"SOLVER.EPOCHS.{name}", solver.EPOCHS[name], 0) for name in _EPOCHS),
    ):
        if value < least:
            raise ConfigError(f"{key} is {value}; write a number of at least {least}.")
    if solver.EPOCHS.MAX == 0 and any(solver.EPOCHS.values()):
        raise ConfigError(
            "SOLVER.EPOCHS.MAX is 0, so the other keys of SOLVER.EPOCHS mean nothing. Write how "
            "many epochs to train."
        )
    _check_best_model(cfg)


def _check_best_model(cfg: CfgNode) -> None:
    best = cfg.TEST.BEST
    if "validation/" in best.METRIC:
        if not cfg.TEST.LOSS:
            raise ConfigError(
                f"TEST.BEST.METRIC is {best.METRIC!r}, but TEST.LOSS is False, so there are no "
                "losses on test data. Write TEST.LOSS True."
            )
        if best.MODE == "max":
            raise ConfigError(
                f"TEST.BEST.METRIC is {best.METRIC!r}, a loss, but TEST.BEST.MODE is 'max', which "
                "would keep the worst model. Write TEST.BEST.MODE min."
            )
    if cfg.TEST.BEST.PATIENCE and not cfg.TEST.BEST.METRIC:
        raise ConfigError(
            "TEST.BEST.PATIENCE ends training by TEST.BEST.METRIC, which is empty. Write a metric, "
            "such as bbox/AP, or TEST.BEST.PATIENCE 0."
        )


_EPOCHS = ("MAX", "WARMUP", "CHECKPOINT", "EVAL")


def expect_one_of(key: str, found: str, *allowed: str) -> None:
    """Raise a `ConfigError` if `found` is not among the values a key knows."""
    if found not in allowed:
        raise ConfigError(f"{key} is {found!r}; write one of {', '.join(allowed)}.")


def _expect_between(key: str, found: float, least: float, most: float) -> None:
    if not least < found <= most:
        raise ConfigError(f"{key} is {found}; write a number above {least:g}, at most {most:g}.")
