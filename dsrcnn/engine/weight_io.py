"""Weight files: written whole or not at all, read without running what they may contain."""

import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import CheckpointError, UnreadableWeightsError, WeightsError

__all__ = [
    "export_weights",
    "read_pickle",
    "read_weights",
    "remove_partial_files",
    "write_atomically",
]

_LOGGER = logging.getLogger(__name__)

_UNTRUSTED = (
    "Weights {path!r} hold more than numbers ({error}). Reading them would run code from the file. "
    "Write MODEL.TRUST_WEIGHTS True if you trust where it comes from."
)


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that there is, at any time, the old one or the whole new one.

    Args:
        path: of the file; its folder exists.
        write: writes into the open file it is given.

    Raises:
        CheckpointError: if writing fails, because the disk is full or read-only; what was at `path`
            is untouched.
    """
    path = Path(path)
    partial: str | None = None
    try:
        # In the same folder: only within a file system is renaming one step.
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # temporary files are private otherwise
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"{path} could not be written ({error}). Earlier files are untouched. Make room, or "
            "write another OUTPUT_DIR."
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def remove_partial_files(folder: str | Path) -> None:
    """Remove what `write_atomically` leaves of checkpoints when its process is killed."""
    for partial in Path(folder).glob(".*.pth.*"):
        _LOGGER.info("Removing %s, which was not written to the end.", partial)
        partial.unlink(missing_ok=True)


def read_weights(path: str, *, trust: bool = False) -> Any:
    """Content of a ``.pth`` or ``.safetensors`` file, on the CPU.

    Args:
        path: of the file.
        trust: run code that the file may hold.

    Raises:
        UnreadableWeightsError: if the file is damaged or no weight file.
        WeightsError: if there is no such file, or it holds more than tensors, numpy arrays and
            plain values.
    """
    if not Path(path).is_file():
        raise WeightsError(f"Weights {path!r} do not exist; write the path of a file.")
    try:
        if path.endswith(".safetensors"):
            return {"model": _read_safetensors(path)}
        torch.serialization.add_safe_globals(_NUMPY)
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"(?:GLOBAL|global:?|class:?) (?!GLOBAL)(\S+)", str(error))
        if forbidden is None:  # torch explains itself in a paragraph; what matters is its kind
            raise _unreadable(path, "not a file of torch") from error
        raise WeightsError(_UNTRUSTED.format(path=path, error=forbidden[1])) from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def read_pickle(path: str, *, trust: bool = False) -> Any:
    """Content of a ``.pkl`` file of Detectron2's model zoo.

    Raises:
        UnreadableWeightsError: if the file is damaged.
        WeightsError: if it holds more than numpy arrays and plain values.
    """
    try:
        with open(path, "rb") as file:
            if trust:
                return pickle.load(file, encoding="latin1")
            return _NumbersOnly(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise WeightsError(_UNTRUSTED.format(path=path, error=error)) from error
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _unreadable(path, error) from error


def export_weights(
    source: str | Path, target: str | Path, *, average: bool = False, trust: bool = False
) -> int:
    """Write the weights of a checkpoint alone, without optimizer and other state.

    Args:
        source: ``.pth``, ``.pkl`` or ``.safetensors``.
        target: ``.safetensors`` or ``.pth``.
        average: the averaged weights instead.
        trust: run code that the source may hold.

    Returns:
        Number of tensors.

    Raises:
        WeightsError: if the source cannot be read or has no averaged weights, or the target has
            another ending.
        CheckpointError: if the target cannot be written.
    """
    source, target = str(source), str(target)
    if not os.path.isfile(source):
        raise WeightsError(f"Weights {source!r} do not exist.")
    if not target.endswith((".safetensors", ".pth")):
        raise WeightsError(
            f"The target is {target!r}; write a name that ends .safetensors or .pth."
        )
    read = read_pickle if source.endswith(".pkl") else read_weights
    content = read(source, trust=trust)
    if average and "ema" not in content:
        raise WeightsError(
            f"{source!r} has no averaged weights; MODEL.EMA was off in its training."
        )
    weights = content["ema"]["model"] if average else content.get("model", content)
    tensors = {k: torch.as_tensor(v).contiguous().clone() for k, v in weights.items()}
    if target.endswith(".pth"):
        write_atomically(target, lambda file: torch.save({"model": tensors}, file))
    else:
        from safetensors.torch import save

        write_atomically(target, lambda file: file.write(save(tensors)))
    return len(tensors)


_DAMAGE = (EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, ImportError)


def _unreadable(path: str, error: object) -> UnreadableWeightsError:
    reason = str(error) or "it ends too early"
    return UnreadableWeightsError(
        f"Weights {path!r} cannot be read ({reason}); the file is damaged or is no checkpoint. "
        "Write another MODEL.WEIGHTS."
    )


def _numpy_globals() -> list[Any]:
    """What arrays and numbers of numpy are made of; harmless."""
    from numpy.lib import format as _  # noqa: F401  (makes the dtypes below known)

    core = getattr(np, "_core", None) or np.core
    kinds = {type(np.dtype(k)) for k in ("?", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8")}
    multiarray = core.multiarray
    return [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *kinds]


_NUMPY = _numpy_globals()


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle asks for something that is neither a number nor a container."""


class _NumbersOnly(pickle.Unpickler):
    """Refuses everything but numpy arrays and containers."""

    _ALLOWED = frozenset(
        [
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # how Python 3 writes bytes for Python 2
            *((m, n) for m in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
              for n in ("ndarray", "dtype", "_reconstruct", "scalar")),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)
