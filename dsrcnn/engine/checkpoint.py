"""Loading weights, with a report of what was loaded, what starts anew and what was not used."""

import os
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from ..errors import WeightsError

__all__ = ["ReportingCheckpointer"]

_SHOWN = 6


class ReportingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with one readable report instead of several warnings.

    With `strict`, a tensor of the model that the file lacks or has in another shape is an error:
    an evaluation with partly random weights means nothing.
    """

    strict = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file; see `DetectionCheckpointer.load`.

        Raises:
            WeightsError: if the file is missing or broken, or does not fit and `strict` is set.
        """
        if not path and self.strict:
            raise WeightsError(
                "MODEL.WEIGHTS is empty, so the model would be evaluated with random weights. "
                "Write MODEL.WEIGHTS <checkpoint>, or --resume for the last one in OUTPUT_DIR."
            )
        if path and "://" not in path and not os.path.isfile(path):
            raise WeightsError(f"Weights {path!r} do not exist; correct MODEL.WEIGHTS.")
        try:
            return super().load(path, *args, **kwargs)
        except WeightsError:
            raise
        except FileNotFoundError as error:
            raise WeightsError(f"Weights {path!r} do not exist; correct MODEL.WEIGHTS.") from error
        except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"Weights {path!r} cannot be read ({error}); the file is damaged, is no "
                "checkpoint, or does not fit this run. Write another MODEL.WEIGHTS."
            ) from error
        except OSError as error:
            raise WeightsError(
                f"Weights {path!r} cannot be fetched ({error}). Write a local file to "
                "MODEL.WEIGHTS, or '' to train from random weights."
            ) from error

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Replace fvcore's warnings by one report; called once by `load`."""
        reshaped = [(k, tuple(a), tuple(b)) for k, a, b in incompatible.incorrect_shapes]
        changed = {k for k, _, _ in reshaped}
        missing = [k for k in incompatible.missing_keys if k not in changed]
        total = len(self.model.state_dict())
        loaded = total - len(missing) - len(reshaped)
        lines = [f"Weights: {loaded} of {total} tensors loaded."]
        if reshaped:
            shapes = [f"{k} {a} in the file, {b} in the model" for k, a, b in reshaped]
            lines.append(f"Of another shape, start anew: {_some(shapes)}.{_class_hint(reshaped)}")
        if missing:
            lines.append(f"Not in the file, start anew: {_by_part(missing)}.")
        if incompatible.unexpected_keys:
            lines.append(f"In the file, not used: {_by_part(incompatible.unexpected_keys)}.")
        report = "\n  ".join(lines)
        if self.strict and (missing or reshaped):
            raise WeightsError(
                f"The weights do not fit the model that is to be evaluated.\n  {report}\n  "
                "Use the config the weights were trained with."
            )
        if missing or reshaped:
            self.logger.warning(report)
        else:
            self.logger.info(report)


def _some(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _by_part(keys: Iterable[str]) -> str:
    """Keys summed up by the part of the model they belong to."""
    parts = Counter(".".join(key.split(".")[:2]) for key in keys)
    return _some([f"{part} ({count})" for part, count in sorted(parts.items())])


def _class_hint(reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    for key, found, expected in reshaped:
        if key.endswith("class_logits.bias"):
            return (
                f" The file has {found[0]} classes, the model {expected[0]}: right when fine-tuning"
                " on other classes, otherwise correct MODEL.SparseRCNN.NUM_CLASSES."
            )
    return ""
