"""Comparison of the tensors of a weight file with those of a model: what is loaded and what not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..modeling.asag.queries import ParallelDecoders
from ..modeling.proposals import ProposalSource, resize_proposals
from ..utils.training import TrainingState

_MAX_EXAMPLES = 6
_Shape = tuple[int, ...]


def tensors_of(content: Any, path: str) -> dict[str, Tensor]:
    """Return the weights of a file by name, as tensors.

    Raises:
        WeightsError: if `content` is no dictionary of tensors.
    """
    if not isinstance(content, Mapping):
        raise _no_weights(path, f"a {type(content).__name__}")
    if not content:
        raise _no_weights(path, "nothing")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        is_array = isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf"
        if is_array and value.dtype.itemsize <= 8:
            value = torch.from_numpy(np.array(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _no_weights(path, f"a {type(value).__name__} named {name!r}")
        is_plain = not (value.is_nested or value.is_quantized or value.is_meta)
        if not is_plain or value.layout != torch.strided:
            raise _no_weights(path, f"a nested, sparse, quantized or empty tensor named {name}")
        state[name.removeprefix("module.")] = value  # of a model wrapped for several processes
    return state


def _no_weights(path: str, found: str) -> WeightsError:
    return WeightsError(
        f"Weights {path!r} hold {found} where tensors by name are expected. Write a checkpoint or "
        "an exported weight file to MODEL.WEIGHTS."
    )


class Fit(NamedTuple):
    """Difference between a weight file and a model, by names in files.

    Attributes:
        total: number of tensors of the model.
        fitting: number of tensors of the file that the model has in this shape.
        missing: tensors of the model that the file lacks.
        reshaped: names with the shapes in the file and in the model, of tensors not loaded.
        resized: the same of tensors that were cut or tiled to the number of proposals.
        unused: tensors of the file that the model lacks.
    """

    total: int
    fitting: int
    missing: list[str]
    reshaped: list[tuple[str, _Shape, _Shape]]
    resized: list[tuple[str, _Shape, _Shape]]
    unused: list[str]

    @property
    def loaded(self) -> int:
        """Number of tensors that were loaded."""
        return self.total - len(self.missing) - len(self.reshaped)

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the model was loaded as it is in the file."""
        return not (self.missing or self.reshaped or self.resized)

    def report(self, separator: str = "\n  ") -> str:
        """Describe the difference, one kind after the other."""
        lines = [f"Weights: {self.loaded} of {self.total} tensors loaded."]
        if self.reshaped:
            texts = [f"{k} {a} in the file, {b} in the model" for k, a, b in self.reshaped]
            hint = _class_count_hint(self.reshaped)
            lines.append(
                f"Not loaded because of their shape, so they start anew: {_examples(texts)}.{hint}"
            )
        if self.resized:
            texts = [f"{k} {a} to {b}" for k, a, b in self.resized]
            lines.append(f"Cut or tiled to the model's number of proposals: {_examples(texts)}.")
        if self.missing:
            lines.append(f"Not in the file: {_count_by_part(self.missing)}.")
        if self.unused:
            lines.append(f"In the file but not in the model: {_count_by_part(self.unused)}.")
        return separator.join(lines)


def load_fitting(model: nn.Module, state: dict[str, Tensor], path: str, *, resize: bool) -> Fit:
    """Load the tensors of `state` that fit the model, in place.

    Args:
        model: whose names of tensors, by `state_dict`, are those of files.
        state: weights by name.
        path: where they come from, for messages.
        resize: cut or tile learned proposals to the model's number of them.

    Raises:
        WeightsError: if values are not finite, or integers where the model has fractions.
    """
    for name, module in model.named_modules():
        if isinstance(module, ParallelDecoders):
            state = module.select_weights(state, f"{name}.")
    own = model.state_dict(keep_vars=True)
    training_state = _training_state(model)
    dimensions = _proposal_dimensions(model) if resize else {}
    reshaped, resized, fitting = [], [], {}
    for name, value in state.items():
        shape, target = tuple(value.shape), own.get(name)
        if target is None or shape == target.shape:
            if target is not None and name not in training_state:
                _check_values(path, name, value, target)
            fitting[name] = value
            continue
        dimension = dimensions.get(id(target))
        size = target.shape[dimension] if dimension is not None else 0
        entry = name, shape, tuple(target.shape)
        if dimension is not None and _differs_only_at(dimension, shape, target.shape):
            _check_values(path, name, value, target)
            fitting[name] = resize_proposals(value, size, dimension)
            resized.append(entry)
        else:
            reshaped.append(entry)
    incompatible = model.load_state_dict(fitting, strict=False)
    left_out = {name for name, *_ in reshaped} | training_state
    # Frozen norms do not count batches, and nothing depends on the count.
    missing = [
        name
        for name in incompatible.missing_keys
        if name not in left_out and not name.endswith("num_batches_tracked")
    ]
    reshaped = [entry for entry in reshaped if entry[0] not in training_state]
    fits, unused = len(own.keys() & fitting), incompatible.unexpected_keys
    return Fit(len(own), fits, missing, reshaped, resized, unused)


def _check_values(path: str, name: str, value: Tensor, target: Tensor) -> None:
    if target.is_floating_point() and not value.is_floating_point():
        raise WeightsError(
            f"Weights {path!r} hold {value.dtype} in {name}, where the model has {target.dtype}. "
            "Write a file with the trained weights, not quantized, to MODEL.WEIGHTS."
        )
    if not bool(torch.isfinite(value.to(target.dtype)).all()):
        raise WeightsError(
            f"Weights {path!r} have values in {name} that are not finite: the training that wrote "
            "them diverged. Write an earlier checkpoint to MODEL.WEIGHTS."
        )


def _differs_only_at(dimension: int, shape: _Shape, target: torch.Size) -> bool:
    pairs = list(zip(shape, target, strict=False))
    rest = [a == b for i, (a, b) in enumerate(pairs) if i != dimension]
    return len(shape) == len(target) and all(rest) and shape[dimension] > 0


def _proposal_dimensions(model: nn.Module) -> dict[int, int]:
    """Return the dimension that counts proposals, by the id of each tensor that has one."""
    return {
        id(module.get_parameter(name)): dimension
        for module in model.modules()
        if isinstance(module, ProposalSource)
        for name, dimension in module.proposal_dimensions.items()
    }


def _training_state(model: nn.Module) -> set[str]:
    """Return the names of tensors that hold training state, which weight files may lack."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, TrainingState)
        for key in module.state_dict()
    }


def _examples(items: list[str]) -> str:
    more = len(items) - _MAX_EXAMPLES
    return "; ".join(items[:_MAX_EXAMPLES]) + (f"; and {more} more" if more > 0 else "")


def _count_by_part(keys: Iterable[str]) -> str:
    """Count keys by part of the model."""
    parts = Counter(".".join(key.split(".")[:2]) for key in keys)
    return _examples([f"{part} ({count})" for part, count in sorted(parts.items())])


def _class_count_hint(reshaped: list[tuple[str, _Shape, _Shape]]) -> str:
    for key, in_file, in_model in reshaped:
        if key.endswith(("class_logits.bias", "fc_cls.bias")):
            return (
                f" The classifier of the file has {in_file[0]} outputs, the model's {in_model[0]}: "
                "right when fine-tuning on other classes, otherwise correct "
                "MODEL.SparseRCNN.NUM_CLASSES."
            )
    return ""
