"""Errors about memory that ran out: recognized, and explained in one sentence."""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config.validate import architecture_of
from ..errors import DsrcnnError, OutOfMemoryError
from ..modeling import SparseRCNN

# What torch and the libraries below it raise as a plain RuntimeError.
_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
)
_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that main memory or a GPU's memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def memory_message(error: BaseException) -> str:
    """Say which memory ran out, and at how large an allocation."""
    text = str(error)
    is_main = isinstance(error, MemoryError) or "llocate memory" in text or "not enough" in text
    found = _AMOUNT.search(text)
    amount = f" when {found[1]} more were needed" if found else ""
    return f"{'Main memory' if is_main else 'GPU memory'} ran out{amount}"


@contextmanager
def explain_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Turn errors about memory inside into an `OutOfMemoryError`.

    Args:
        explain: returns where it happened and what to do, to end a sentence that says that memory
            ran out.

    Raises:
        OutOfMemoryError: if memory runs out.
    """
    try:
        yield
    except DsrcnnError:  # explained already
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold what fills the memory
        raise OutOfMemoryError(f"{memory_message(error)} {explain()}") from error


def explain_test_memory(cfg: CfgNode, name: str) -> Any:
    """Return `explain_memory` for the evaluation of test set `name`."""
    size = cfg.INPUT.MIN_SIZE_TEST
    advice = f"less than {size} for INPUT.MIN_SIZE_TEST" if size else "INPUT.MIN_SIZE_TEST, now 0"
    return explain_memory(lambda: f"in the evaluation on {name}. Write {advice}.")


def describe_batch(batch: Sequence[Any]) -> str:
    """Describe the images of a training batch: their number, largest size and most objects."""
    records = [x for x in batch if isinstance(x, dict)]
    shapes = [tuple(x["image"].shape[-2:]) for x in records if "image" in x]
    counts = [len(x["instances"]) for x in records if "instances" in x]
    largest = max(shapes, key=lambda s: s[0] * s[1], default=None)
    text = f"{len(batch)} image" + ("s" if len(batch) != 1 else "")
    if largest:
        text += f" of up to {largest[0]} x {largest[1]} pixels"
    return text + (f" and {max(counts)} objects" if counts else "")


def memory_keys(cfg: CfgNode) -> list[str]:
    """List what a config can be changed to for less memory in training, the cheapest first.

    ``SOLVER.ACCUMULATE`` is not in it, as it depends on the batch.
    """
    model, keys = cfg.MODEL, []
    if not cfg.SOLVER.AMP.ENABLED and model.DEVICE.startswith("cuda"):
        keys.append("SOLVER.AMP.ENABLED True")
    is_cascade = issubclass(architecture_of(cfg), SparseRCNN)
    if is_cascade and len(model.ACTIVATION_CHECKPOINT) < 2:
        keys.append("MODEL.ACTIVATION_CHECKPOINT \"('backbone','stages')\"")
    return [*keys, "a smaller INPUT.MIN_SIZE_TRAIN"]


def memory_advice(images: int, parts: int, keys: Sequence[str]) -> str:
    """Say what lets a training batch fit into less memory.

    Args:
        images: of a batch, in this process.
        parts: ``SOLVER.ACCUMULATE``.
        keys: from `memory_keys`.
    """
    finer = next((n for n in range(parts + 1, images + 1) if images % n == 0), None)
    *first, last = [f"SOLVER.ACCUMULATE {finer}"] * bool(finer) + list(keys)
    return f"Write {', '.join(first)}{' or ' if first else ''}{last}."
