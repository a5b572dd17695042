"""Evaluation by CUDA graphs, one for every padded size (``TEST.CUDA_GRAPH``).

A graph launches all kernels of a pass at once, and a small batch spends most of its time launching
them. Everything between the padded images and the detections is in the graph, NMS included.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..layers.constants import holding
from .postprocessing import Detections, DetectionSettings

_LOGGER = logging.getLogger(__name__)
_MOST = 16  # graphs, each with the memory of its activations
_WARM_UP = 2  # passes before a capture, in which libraries allocate and choose their algorithms


class _Inputs(NamedTuple):
    """Tensors of an `ImageBatch`."""

    tensor: Tensor
    sizes: Tensor
    originals: Tensor


class Evaluated(Protocol):
    """Interface of a detector that is captured; see `SparseDetector`."""

    training: bool

    def modules(self) -> Iterable[nn.Module]:
        """Return all modules."""
        ...

    def graph_key(self) -> Hashable:
        """Return the settings that a graph has from its capture on."""
        ...

    def detect(
        self, tensor: Tensor, sizes: Tensor, originals: Tensor, settings: DetectionSettings
    ) -> Detections:
        """See `SparseDetector.detect`."""
        ...


@dataclass(frozen=True)
class _Graph:
    """A captured pass.

    Attributes:
        replay: computes `outputs` from `inputs`, all at fixed addresses.
        constants: other tensors that it reads, kept alive.
    """

    replay: Callable[[], None]
    inputs: _Inputs
    outputs: Detections
    constants: list[object]

    def __call__(self, inputs: _Inputs) -> Detections:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self.replay()
        # The next replay overwrites them.
        return Detections(*(x.clone() for x in self.outputs))


class CudaGraphs:
    """The graphs of a detector.

    A padded size is captured when it is met for the second time, up to a limit; other passes run as
    they are, as do all on CPUs and those with gradients. Changed weights discard all graphs. If a
    pass cannot be captured, a warning says why, and none is tried again.
    """

    def __init__(self, most: int = _MOST) -> None:
        self.most = most
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: Counter[Hashable] = Counter()
        self._weights: Hashable = None
        self._modules: list[nn.Module] = []  # those with weights
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None  # when the last replay ends
        self._stopped = False
        self._lock = threading.Lock()  # predictions may run in several threads

    def __reduce__(self) -> tuple[type["CudaGraphs"], tuple[int]]:
        """Copy the settings only: graphs belong to the weights of one model."""
        return CudaGraphs, (self.most,)

    def clear(self) -> None:
        """Discard all graphs, and free their memory."""
        if self._done is not None:
            self._done.synchronize()
        self._graphs.clear()
        self._seen.clear()
        self._modules, self._pool, self._done = [], None, None

    def __call__(
        self,
        detector: Evaluated,
        inputs: tuple[Tensor, Tensor, Tensor],
        settings: DetectionSettings,
    ) -> Detections:
        """Return what ``detector.detect(*inputs, settings)`` does, by a graph where possible."""
        device, is_plain = inputs[0].device, self._stopped or detector.training
        if is_plain or torch.is_grad_enabled() or not can_capture(device):
            return detector.detect(*inputs, settings)
        with self._lock:
            graph = self._graph_for(detector, _Inputs(*inputs), settings)
            if graph is not None:
                return self._replay(graph, _Inputs(*inputs))
        return detector.detect(*inputs, settings)

    def _replay(self, graph: _Graph, inputs: _Inputs) -> Detections:
        """Replay a graph after the last replay, which may be in the stream of another thread."""
        if inputs.tensor.device.type != "cuda":
            return graph(inputs)
        stream = torch.cuda.current_stream(inputs.tensor.device)
        if self._done is not None:
            stream.wait_event(self._done)
        detections = graph(inputs)
        self._done = stream.record_event()
        return detections

    def _graph_for(
        self, detector: Evaluated, inputs: _Inputs, settings: DetectionSettings
    ) -> _Graph | None:
        """Find or capture the graph of inputs; None if they run as they are."""
        weights = self._signature(detector)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        kind = inputs.tensor.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shape = tuple(inputs.tensor.shape)
        key = (shape, inputs.tensor.dtype, settings, dtype, detector.graph_key())
        if key in self._graphs:
            return self._graphs[key]
        self._seen[key] += 1
        if self._seen[key] < 2:
            return None
        if len(self._graphs) >= self.most:
            if self._seen[key] == 2:
                _LOGGER.info(
                    "TEST.CUDA_GRAPH: images padded to %d x %d run without a graph, since %d other "
                    "sizes have one; INPUT.NUM_BUCKETS lowers the number of sizes.",
                    *(*inputs.tensor.shape[2:], len(self._graphs)),
                )
            return None
        try:
            self._graphs[key] = self._capture(detector, inputs, settings, dtype)
        except RuntimeError as error:
            _LOGGER.warning(
                "TEST.CUDA_GRAPH: the pass cannot be captured, so evaluation runs without graphs: "
                "%s",
                error,
            )
            self._stopped = True
            self.clear()
            return None
        return self._graphs[key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(
        self,
        detector: Evaluated,
        inputs: _Inputs,
        settings: DetectionSettings,
        dtype: torch.dtype | None,
    ) -> _Graph:
        # `batched_nms` waits for the number of detections.
        settings = replace(settings, dense_nms=True)
        places = _Inputs(*(x.clone() for x in inputs))
        kind = inputs.tensor.device.type
        # Autocast would keep converted weights until it ends, the graph needs them longer: so it
        # converts them itself.
        context = torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)
        with holding() as constants, context:
            if self._pool is None:
                self._pool = new_pool(inputs.tensor.device)
            function = lambda: detector.detect(*places, settings)  # noqa: E731
            replay, outputs = capture(function, self._pool, inputs.tensor.device)
        return _Graph(replay, places, outputs, constants)

    def _signature(self, detector: Evaluated) -> Hashable:
        """Address and version of all weights.

        Changes of ``x.data`` in place are not seen, nor modules that are replaced.
        """
        if not self._modules:  # a walk through all of them takes longer than a replay
            self._modules = [m for m in detector.modules() if m._parameters or m._buffers]
        values = [[*m._parameters.values(), *m._buffers.values()] for m in self._modules]
        return tuple((x.data_ptr(), x._version) for row in values for x in row if x is not None)


def can_capture(device: torch.device) -> bool:
    """Whether passes on a device can be captured."""
    return device.type == "cuda"


def new_pool(device: torch.device) -> Any:
    """Return a memory pool that graphs share: no two of them run at once."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


def capture(
    function: Callable[[], Detections], pool: Any, device: torch.device
) -> tuple[Callable[[], None], Detections]:
    """Capture a function of fixed tensors; return its replay and its outputs.

    Raises:
        RuntimeError: if it waits for the device, copies from the host or needs too much memory, or
            if the replay computes nothing.
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # In the stream of the device: torch's default is one stream for all of them.
        mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **mode):
            outputs = function()
        outputs.scores.fill_(torch.nan)
        graph.replay()
        if outputs.scores.isnan().all() and outputs.scores.numel():
            raise RuntimeError("the captured graph computes nothing")
    return graph.replay, outputs
