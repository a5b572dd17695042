"""Patches that let Detectron2 0.6, as pure Python, run on current torch, numpy and Pillow.

Nothing else in this package patches code outside of it. `ensure_compatible` runs before any other
import of ``dsrcnn``. Each patch checks for the feature it restores, so they are no-ops on
Detectron2's main branch with its compiled extension. One thing is added everywhere:
`_refuse_default_optimizer`, for models of this package only.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

_INSTALL_HINT = (
    "Detectron2 is not installed. In a clone of this repository run `make setup`; elsewhere run "
    "`pip install 'git+https://github.com/facebookresearch/detectron2.git'` (docs/INSTALL.md)."
)
_FILES_WITH_REMOVED_NAMES = (
    "data/build.py",
    "data/datasets/lvis.py",
    "data/datasets/pascal_voc.py",
    "data/transforms/transform.py",
    "evaluation/pascal_voc_evaluation.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/keypoints.py",
    "structures/masks.py",
)


class _MissingExtension(types.ModuleType):
    """Placeholder for ``detectron2._C`` where Detectron2 was installed without its C++ sources.

    It has the three functions that ``detectron2.utils.collect_env`` calls; any other raises an
    error that says what is missing.
    """

    def __init__(self) -> None:
        super().__init__("detectron2._C", "Placeholder: Detectron2 has no compiled extension here.")
        self.__spec__ = importlib.machinery.ModuleSpec(self.__name__, None)
        self.__file__ = "detectron2._C (not compiled)"
        self.get_compiler_version = lambda: "none (pure Python installation)"
        self.get_cuda_version = lambda: "not available"
        self.has_cuda = lambda: False

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
    """Provide ``detectron2._C``, which 0.6 imports unconditionally in four modules.

    An extension that exists but does not load is left alone, so that its own error is shown.
    """
    if "detectron2._C" not in sys.modules and importlib.util.find_spec("detectron2._C") is None:
        import detectron2

        module = _MissingExtension()
        sys.modules["detectron2._C"] = module
        # `from detectron2 import _C` reads the attribute, `import detectron2._C` the module table.
        detectron2._C = module


def has_compiled_extension() -> bool:
    """Whether Detectron2's compiled operators are available."""
    return not isinstance(sys.modules.get("detectron2._C"), _MissingExtension)


def _restore_removed_names(root: Path) -> None:
    """Restore what Pillow 10 and numpy 1.24 removed, as far as Detectron2's source uses it."""
    import numpy as np
    from PIL import Image

    paths = [root / name for name in _FILES_WITH_REMOVED_NAMES]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    if "Image.LINEAR" in source and not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.BILINEAR  # type: ignore[attr-defined]
    for alias in (bool, int, float, object, str):
        if re.search(rf"\bnp\.{alias.__name__}\b", source) and alias.__name__ not in vars(np):
            setattr(np, alias.__name__, alias)


def _fall_back_to_pycocotools() -> None:
    """Let ``COCOEvaluator`` compute its metrics with pycocotools if the fast code is not compiled.

    Detectron2's main branch does so; 0.6 fails after the whole evaluation.
    """
    from detectron2.evaluation import coco_evaluation

    plain = coco_evaluation.COCOeval
    if has_compiled_extension() or vars(coco_evaluation).get("COCOeval_opt", plain) is plain:
        return

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        message = "Fast COCO evaluation is not compiled here: pycocotools computes the metrics."
        logging.getLogger("detectron2.evaluation.coco_evaluation").info(message)
        return plain(*args, **kwargs)

    coco_evaluation.COCOeval_opt = evaluate


def _refuse_default_optimizer() -> None:
    """Let ``DefaultTrainer`` refuse to train this package's models with its own optimizer.

    It knows nothing of ``SOLVER.OPTIMIZER`` and would silently train by SGD with a learning rate
    meant for AdamW. Other models, and trainers that build their optimizer themselves, as that of
    the official Sparse R-CNN does, are not affected.
    """
    from detectron2.engine import defaults

    original = defaults.build_optimizer
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def build_optimizer(cfg: Any, model: Any) -> Any:
        from .errors import ConfigError
        from .utils.training import TrainableModel

        if isinstance(model, TrainableModel):
            raise ConfigError(
                f"Detectron2's DefaultTrainer builds an optimizer without SOLVER.OPTIMIZER, so "
                f"{type(model).__name__} would not learn. Use dsrcnn.engine.trainer.Trainer in its "
                "place, train_net.py, or dsrcnn train."
            )
        return original(cfg, model)

    defaults.build_optimizer = build_optimizer


def _import_quietly() -> None:
    """Import Detectron2's models without the deprecation warnings of ``torch.jit.script``.

    They would precede the output of every command and worker.
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
    _restore_removed_names(Path(spec.origin).parent)
    _provide_compiled_extension()
    _import_quietly()
    _fall_back_to_pycocotools()
    _refuse_default_optimizer()


def create_local_process_group(processes_per_machine: int) -> None:
    """Create Detectron2's group of the processes on this machine; all processes call it.

    0.6 has no function for it; its ``launch``, which requires CUDA, sets the variable directly.
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
    """Drop Detectron2's references to process groups, whose threads live as long as they do."""
    from detectron2.utils import comm

    if hasattr(comm._get_global_gloo_group, "cache_clear"):
        comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
