"""Bridges between Detectron2 0.6 and today's torch, numpy and Pillow.

Detectron2's last release is from 2021 and is installed here as pure Python. This module is the only
place that patches anything outside the package. It runs once, before any other import of
``dsrcnn``; every patch looks for the one feature it bridges, so on Detectron2's main branch with
its compiled extension all of them are no-ops.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "create_local_process_group",
    "ensure_compatible",
    "forget_process_groups",
    "has_compiled_extension",
]

_INSTALL_HINT = (
    "Detectron2 is not installed. In a clone of this repository run `make setup`; elsewhere run "
    "`pip install 'git+https://github.com/facebookresearch/detectron2.git'` (README, Installation)."
)
_REMOVED_NUMPY_ALIASES = {"bool": bool, "int": int, "float": float, "object": object, "str": str}


class _MissingExtension(types.ModuleType):
    """Stands in for ``detectron2._C`` where Detectron2 was installed without its C++ sources.

    The three functions that ``detectron2.utils.collect_env`` calls answer; any other use says what
    is missing instead of failing with an unrelated ``AttributeError``.
    """

    def __init__(self) -> None:
        super().__init__("detectron2._C", "Placeholder: Detectron2 has no compiled extension here.")
        self.__spec__ = importlib.machinery.ModuleSpec(self.__name__, None)
        self.__file__ = "detectron2._C (not compiled)"

    @staticmethod
    def get_compiler_version() -> str:
        """Answer of ``collect_env`` to "which compiler"."""
        return "none (pure Python installation)"

    @staticmethod
    def get_cuda_version() -> str:
        """Answer of ``collect_env`` to "which CUDA"."""
        return "not available"

    @staticmethod
    def has_cuda() -> bool:
        """Tells ``collect_env`` not to look for GPU code in a library that does not exist."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                f"detectron2._C.{name} needs Detectron2's compiled extension, which this "
                "installation lacks. Install Detectron2 from source with a compiler to use it."
            )

        return unavailable


def _provide_compiled_extension() -> None:
    """0.6 imports ``detectron2._C`` without a guard in four modules, even where it is unused.

    An extension that is there but does not load is left alone: its own error says why.
    """
    if "detectron2._C" not in sys.modules and importlib.util.find_spec("detectron2._C") is None:
        import detectron2

        module = _MissingExtension()
        sys.modules["detectron2._C"] = module
        # `from detectron2 import _C` reads the attribute, `import detectron2._C` the module table.
        detectron2._C = module


def has_compiled_extension() -> bool:
    """Whether Detectron2's own operators are there."""
    return not isinstance(sys.modules.get("detectron2._C"), _MissingExtension)


def _source_of(root: Path, relative: str) -> str:
    path = root / relative
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _restore_pillow_linear(root: Path) -> None:
    """Pillow 10 removed ``Image.LINEAR``, a default argument in 0.6's ``transform.py``."""
    from PIL import Image

    mentions = "Image.LINEAR" in _source_of(root, "data/transforms/transform.py")
    if mentions and not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.BILINEAR  # type: ignore[attr-defined]


def _restore_numpy_aliases(root: Path) -> None:
    """Numpy 1.24 removed ``np.int`` and its kind; 0.6 uses them in loaders and evaluators."""
    import numpy as np

    files = (
        "data/build.py",
        "data/datasets/lvis.py",
        "data/datasets/pascal_voc.py",
        "evaluation/pascal_voc_evaluation.py",
        "evaluation/sem_seg_evaluation.py",
        "structures/keypoints.py",
        "structures/masks.py",
    )
    source = "\n".join(_source_of(root, name) for name in files)
    for alias, builtin in _REMOVED_NUMPY_ALIASES.items():
        if re.search(rf"\bnp\.{alias}\b", source) and alias not in np.__dict__:
            setattr(np, alias, builtin)


def _import_quietly() -> None:
    """Some modules use ``torch.jit.script`` when imported, which newer torch calls deprecated.

    A user can do nothing about it, and it would head the output of every command and worker.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        import detectron2.modeling  # noqa: F401


def ensure_compatible() -> None:
    """Make the installed Detectron2 importable. Idempotent.

    Raises:
        ImportError: if Detectron2 is not installed.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise ImportError(_INSTALL_HINT)
    root = Path(spec.origin).parent
    _restore_pillow_linear(root)
    _restore_numpy_aliases(root)
    _provide_compiled_extension()
    _import_quietly()


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes share a machine; all processes call it.

    0.6 has no function for it: its ``launch``, which insists on CUDA, writes the variable itself.
    """
    import torch.distributed as dist
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def forget_process_groups() -> None:
    """Drop the process groups that Detectron2 holds, so that their threads can end.

    A group, and the threads it talks by, live as long as anything holds it.
    """
    from detectron2.utils import comm

    if hasattr(comm._get_global_gloo_group, "cache_clear"):
        comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
