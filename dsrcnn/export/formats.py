"""File formats of exported models: ONNX, torch.export and TorchScript."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor
from torch.torch_version import TorchVersion

from ..errors import ExportError, MissingPackageError
from ..layers.deform_conv import DeformConv as OurDeformConv
from .half import SCOPES, to_half
from .info import INPUT, KEY, OUTPUTS, ModelInfo
from .parity import Detections
from .program import Program

LARGEST = 16_384  # side of an image, in pixels
_OPSET, _DEFORMABLE_OPSET = 18, 19  # the first one with deformable convolution
_ONNX_TORCH = "2.6"
_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)  # batch norms are part of convolutions


class Session(ABC):
    """An exported file, ready to run.

    Attributes:
        info: its metadata.
    """

    info: ModelInfo

    @abstractmethod
    def run(self, images: np.ndarray) -> list[Detections]:
        """Detect objects in images (B, h, w, 3) uint8 RGB; a result per image, best first."""


def _per_image(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> list[Detections]:
    """Split a batch into images, without the rows that are no detections.

    Raises:
        ExportError: for numbers that are not finite.
    """
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ExportError(
            "The exported model computes numbers that are not finite. Export it without --half."
        )
    kept = scores > 0
    parts = zip(boxes, scores, labels, kept, strict=True)
    return [(b[k].astype(np.float32), s[k].astype(np.float32), c[k]) for b, s, c, k in parts]


def run_program(program: torch.nn.Module, images: np.ndarray) -> list[Detections]:
    """Run a program, or what was made of it, as `Session.run`."""
    device = next(iter([*program.parameters(), *program.buffers()])).device
    with torch.inference_mode():
        pixels = torch.from_numpy(np.require(images, requirements="W")).to(device)
        outputs = program(pixels)
    boxes, scores, labels = (x.float().cpu().numpy() for x in outputs)
    return _per_image(boxes, scores, labels.astype(np.int64))


class Format(ABC):
    """A file format.

    Attributes:
        suffix: of its files.
        dynamic_batch: whether files can take any number of images.
        needs_torchvision: whether deformable convolutions are operators of torchvision in it.
    """

    suffix: ClassVar[str]
    dynamic_batch: ClassVar[bool] = True
    needs_torchvision: ClassVar[bool] = True

    def check(self) -> None:
        """Raise a `MissingPackageError` if a package is missing or too old."""
        return

    @abstractmethod
    def write(self, program: Program, info: ModelInfo, path: Path) -> None:
        """Export a program to a file."""

    @abstractmethod
    def open(self, path: Path, *, exact: bool = False) -> Session:
        """Open an exported file; `exact` for float32 that no device rounds."""


class TorchExport(Format):
    """``torch.export``, whose files end with ``.pt2``."""

    suffix = ".pt2"

    def write(self, program: Program, info: ModelInfo, path: Path) -> None:
        """Export with dynamic height and width."""
        _store_half(program, info)
        exported = torch.export.export(
            program, (_example(program, info),), dynamic_shapes=(_dynamic(info),), strict=False
        )
        for module in exported.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # has the folders of this machine
        torch.export.save(exported, path, extra_files={KEY: info.to_json()})

    def open(self, path: Path, *, exact: bool = False) -> Session:
        """Open a file; those of others can run code."""
        extra = {KEY: ""}
        exported = torch.export.load(path, extra_files=extra)
        return _TorchSession(exported.module(), ModelInfo.from_json(extra[KEY], str(path)))


class TorchScript(Format):
    """Traced TorchScript, whose files end with ``.torchscript``.

    PyTorch calls it deprecated; it is for programs that can read nothing else, such as those in
    C++.
    """

    suffix = ".torchscript"
    dynamic_batch = False

    def write(self, program: Program, info: ModelInfo, path: Path) -> None:
        """Trace; height and width stay dynamic."""
        with warnings.catch_warnings(), torch.no_grad():
            for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
                warnings.simplefilter("ignore", category)
            _store_half(program, info)
            traced = torch.jit.trace(program, (_example(program, info),), check_trace=False)
            torch.jit.save(traced, path, _extra_files={KEY: info.to_json()})

    def open(self, path: Path, *, exact: bool = False) -> Session:
        """Open a file."""
        extra = {KEY: ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(path, _extra_files=extra)
        text: Any = extra[KEY]
        text = text.decode() if isinstance(text, bytes) else text
        return _TorchSession(module, ModelInfo.from_json(text, str(path)))


class Onnx(Format):
    """ONNX, for onnxruntime, OpenVINO, TensorRT and others."""

    suffix = ".onnx"
    needs_torchvision = False

    def check(self) -> None:
        """Look for the packages that torch's exporter needs, for onnxruntime and a recent torch."""
        if TorchVersion(torch.__version__) < _ONNX_TORCH:  # no `dynamic_shapes` and `optimize`
            raise MissingPackageError(
                f"ONNX export needs torch {_ONNX_TORCH} or newer, and this is torch "
                f"{torch.__version__}. Install it, pip install --upgrade torch torchvision, or "
                "export to torch-export or torchscript."
            )
        for name in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
            _import(name)

    def write(self, program: Program, info: ModelInfo, path: Path) -> None:
        """Export through ``torch.export``, with operators of opset 18."""
        example = _example(program, info)
        # Half precision comes afterwards: the exporter does not know autocast.
        layers = program.half_layers(example) if info.half else set[str]()
        program.half_precision = False
        opset = _DEFORMABLE_OPSET if has_deformable(program) else _OPSET
        with _quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(_dynamic(info),),
                input_names=[INPUT],
                output_names=[*OUTPUTS],
                optimize=True,
                verbose=False,
            )
        assert exported is not None
        _strip(exported.model, keep_scopes=info.half)
        exported.model.metadata_props[KEY] = info.to_json()
        exported.save(path, external_data=False)
        if info.half:
            norms = {name for name, m in program.named_modules() if isinstance(m, _NORMS)}
            to_half(path, layers, norms)

    def open(self, path: Path, *, exact: bool = False) -> Session:
        """Open a file on all cores of the CPU, or on the GPU of onnxruntime-gpu."""
        return OnnxSession(path, use_gpu=not exact)  # a GPU's convolutions are TF32


FORMATS: dict[str, Format] = {
    "onnx": Onnx(),
    "torch-export": TorchExport(),
    "torchscript": TorchScript(),
}


class _TorchSession(Session):
    def __init__(self, module: torch.nn.Module, info: ModelInfo) -> None:
        self.module, self.info = module, info

    def run(self, images: np.ndarray) -> list[Detections]:
        return run_program(self.module, images)


class OnnxSession(Session):
    """An ONNX file in onnxruntime.

    Attributes:
        on_gpu: whether it runs on a GPU.
    """

    def __init__(self, path: Path, *, use_gpu: bool = True) -> None:
        """Open a file on the GPU of onnxruntime-gpu, or on all cores of the CPU.

        Args:
            path: of the file.
            use_gpu: where there is one.

        Raises:
            MissingPackageError: if onnxruntime is not installed.
            ExportError: if the file cannot be used.
        """
        runtime = _import("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        # Images run side by side; threads that wait for more work would take their cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = runtime.get_available_providers()
        names = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in names[not use_gpu :] if name in available]
        if not path.is_file():
            raise ExportError(f"{path} does not exist. Correct the path.")
        try:
            self.session = runtime.InferenceSession(path, options, providers=providers)
            self.on_gpu = self.session.get_providers()[0] == names[0]
            inputs = [(x.name, x.type, len(x.shape)) for x in self.session.get_inputs()]
            outputs = [x.name for x in self.session.get_outputs()]
            text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        except Exception as error:  # onnxruntime has no base class of its errors
            reason = " ".join(str(error).split())[:200]
            raise ExportError(
                f"{path} cannot be opened by onnxruntime: {reason}. Export the model again."
            ) from error
        self.info = ModelInfo.from_json(text, str(path))
        if inputs != [(INPUT, "tensor(uint8)", 4)] or outputs != [*OUTPUTS]:
            raise ExportError(
                f"{path} has the inputs {inputs} and outputs {outputs}, not those of an exported "
                "detector. Export it again."
            )

    def run(self, images: np.ndarray) -> list[Detections]:
        """Detect objects, see `Session`."""
        return _per_image(*self.session.run([*OUTPUTS], {INPUT: images}))


def _example(program: Program, info: ModelInfo) -> Tensor:
    """Images (B, h, w, 3) of a size that is none of the program's."""
    count = 2 if info.dynamic_batch else 1
    device = program.model.device
    height, width = (side + side // 3 + 5 for side in program.canvas)
    return torch.zeros((count, height, width, 3), dtype=torch.uint8, device=device)


def has_deformable(program: Program) -> bool:
    """Whether a program has deformable convolutions."""
    layers = (DeformConv, ModulatedDeformConv, OurDeformConv)
    return any(isinstance(module, layers) for module in program.modules())


def _store_half(program: Program, info: ModelInfo) -> None:
    """Store the weights that are used in half precision so."""
    if info.half:
        names = program.half_layers(_example(program, info))
        for name in names:
            program.get_submodule(name).half()


def _dynamic(info: ModelInfo) -> dict[int, Any]:
    axes = {1: torch.export.Dim("height", min=1, max=LARGEST)}
    axes[2] = torch.export.Dim("width", min=1, max=LARGEST)
    if info.dynamic_batch:
        axes[0] = torch.export.Dim("batch", min=1, max=1024)
    return axes


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == name):
            raise MissingPackageError(
                f"The package {name} is installed but cannot be imported: {error}. Install it "
                "again."
            ) from error
        raise MissingPackageError(
            f"ONNX files need the package {name}, which is not installed: "
            "pip install 'dsrcnn[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about constants that it does not fold."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(model: Any, *, keep_scopes: bool) -> None:
    """Remove what nothing uses, and stack traces, which have the folders of this machine."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if keep_scopes and scopes is not None:
            node.metadata_props[SCOPES] = scopes
