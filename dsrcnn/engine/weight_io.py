"""Weight files: atomic writing, and reading that does not run code from the file."""

import logging
import os
import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import CheckpointError, UnreadableWeightsError, WeightsError
from .fit_weights import tensors_of

_LOGGER = logging.getLogger(__name__)
_UNTRUSTED = (
    "Weights {path!r} contain more than numbers ({error}). Reading them would run code from the "
    "file. If you trust its source, write MODEL.TRUST_WEIGHTS True (dsrcnn weights: --trust)."
)


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any time either the old or the complete new content is there.

    Raises:
        CheckpointError: if writing fails, such as on a full disk; the old file is untouched.
    """
    path = Path(path)
    partial: str | None = None
    try:
        # In the same folder, since renaming is atomic only within a file system.
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # temporary files are private by default
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        raise CheckpointError(
            f"{path} could not be written ({reason}). Earlier files are untouched. Make room, or "
            "write another OUTPUT_DIR."
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def remove_partial_files(folder: str | Path) -> None:
    """Remove partial checkpoints, which `write_atomically` leaves when its process is killed."""
    for partial in Path(folder).glob(".*.pth.*"):
        _LOGGER.info("Removing %s, which is incomplete.", partial)
        partial.unlink(missing_ok=True)


def read_weights(path: str, *, trust: bool = False, lazily: bool = False) -> Any:
    """Read a ``.pth`` or ``.safetensors`` file to the CPU; `trust` runs code that it contains.

    The checksums of its content are verified, which torch does not do; with `lazily`, tensors are
    neither verified nor read before they are used.

    Raises:
        UnreadableWeightsError: if the file is damaged or no weight file.
        WeightsError: if it does not exist or contains more than tensors, numpy arrays and plain
            values.
    """
    require_file(path)
    if not lazily:
        _verify_checksums(path)
    try:
        if path.endswith(".safetensors"):
            return {"model": _read_safetensors(path)}
        torch.serialization.add_safe_globals(_NUMPY)
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=lazily)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"(?:GLOBAL|global:?|class:?) (?!GLOBAL)(\S+)", str(error))
        if forbidden is None:
            raise _unreadable(path, "not a file of torch") from error
        raise WeightsError(_UNTRUSTED.format(path=path, error=forbidden[1])) from error
    except WeightsError:
        raise
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def require_file(path: str) -> None:
    """Raise a `WeightsError` if there is no regular file at `path`; pipes would never end."""
    if os.path.isfile(path):
        return
    problem = "do not exist"
    if os.path.isdir(path):
        problem = "are a folder"
    elif os.path.exists(path):
        problem = "are no regular file"
    raise WeightsError(f"Weights {path!r} {problem}; write the path of a file to MODEL.WEIGHTS.")


def _verify_checksums(path: str) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise _unreadable(path, f"wrong checksum of {damaged}")


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def read_pickle(path: str, *, trust: bool = False) -> Any:
    """Read a ``.pkl`` file of Detectron2's model zoo; `trust` runs code that it contains.

    Raises:
        UnreadableWeightsError: if the file is damaged.
        WeightsError: if it contains more than numpy arrays and plain values.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            if trust:
                return pickle.load(file, encoding="latin1")
            return _NumpyUnpickler(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise WeightsError(_UNTRUSTED.format(path=path, error=error)) from error
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _unreadable(path, error) from error


def read_any(path: str, *, trust: bool = False) -> Any:
    """Read a weight file of any kind, by its ending; see `read_weights` and `read_pickle`."""
    return (read_pickle if path.endswith(".pkl") else read_weights)(path, trust=trust)


def export_weights(
    source: str | Path, target: str | Path, *, average: bool = False, trust: bool = False
) -> int:
    """Write the weights of a ``.pth``, ``.pkl`` or ``.safetensors`` file without other state.

    Args:
        source: file to read.
        target: ``.safetensors`` or ``.pth``.
        average: take the averaged weights (``MODEL.EMA``).
        trust: run code that the source may contain.

    Returns:
        The number of tensors.

    Raises:
        WeightsError: if the source cannot be read or has no averaged weights, or the target has
            another extension.
        CheckpointError: if the target cannot be written.
    """
    source, target = str(source), str(target)
    if not target.endswith((".safetensors", ".pth")):
        raise WeightsError(
            f"The target is {target!r}; write a name that ends in .safetensors or .pth."
        )
    if os.path.exists(target) and os.path.samefile(source, target):
        raise WeightsError(
            f"The target {target!r} is the source, whose other state would be lost; write another "
            "name."
        )
    content = read_any(source, trust=trust)
    content = content if isinstance(content, dict) else {"model": content}
    ema = content.get("ema")
    if average and not (isinstance(ema, dict) and "model" in ema):
        raise WeightsError(
            f"{source!r} has no averaged weights beside others: MODEL.EMA was off in its training, "
            "or it is model_best.pth or model_final.pth, which hold the average alone. Leave out "
            "--average."
        )
    weights = content["ema"]["model"] if average else content.get("model", content)
    tensors = {k: v.contiguous().clone() for k, v in tensors_of(weights, source).items()}
    if target.endswith(".pth"):
        write_atomically(target, lambda file: torch.save({"model": tensors}, file))
    else:
        from safetensors.torch import save

        try:
            packed = save(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"The tensors of {source!r} do not fit into .safetensors ({error}); write a name "
                "that ends in .pth."
            ) from error
        write_atomically(target, lambda file: file.write(packed))
    return len(tensors)


_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError),
)


def _unreadable(path: str, error: object) -> UnreadableWeightsError:
    reason = str(error).split("\n")[0] or "it ends too early"
    return UnreadableWeightsError(
        f"Weights {path!r} cannot be read ({reason}); the file is damaged or no checkpoint. "
        "Write another MODEL.WEIGHTS."
    )


def _numpy_globals() -> list[Any]:
    """Types that pickled numpy arrays and scalars consist of."""
    from numpy.lib import format as _  # noqa: F401  (defines the dtypes below)

    core = np._core if hasattr(np, "_core") else np.core  # renamed in numpy 2
    multiarray = core.multiarray
    dtypes = {type(np.dtype(k)) for k in ("?", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8")}
    return [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]


_NUMPY = _numpy_globals()


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickler that refuses everything but numpy arrays and containers."""

    _ALLOWED = frozenset(
        [
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # bytes in pickles that Python 2 can read
            *((m, n) for m in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
              for n in ("ndarray", "dtype", "_reconstruct", "scalar")),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)
