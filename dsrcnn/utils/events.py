"""When and where a model may write into the training log."""

import torch
from detectron2.utils.events import EventStorage, get_event_storage

__all__ = ["storage_in_turn"]


def storage_in_turn(period: int) -> EventStorage | None:
    """The event storage of the running training, if it is this iteration's turn.

    Whatever is written is computed for the log alone and read from the device, so it should happen
    rarely: in step with Detectron2's writers, every `period` iterations.

    Args:
        period: in iterations; 0 for never.

    Returns:
        None out of turn, without a trainer, while a model is being compiled, and without gradients:
        what is computed then is no training step.
    """
    if not period or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    try:
        storage = get_event_storage()
    except AssertionError:
        return None
    return None if (storage.iter + 1) % period else storage
