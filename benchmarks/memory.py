"""The most memory that tensors need at once while something runs."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory_of"]


def peak_memory_of(run: Callable[[], object]) -> int:
    """Bytes of tensors at the highest point of a run, beyond those that were there before it.

    On a GPU it is what its allocator counts; on a CPU, which keeps no count, every allocation is
    recorded, so the run is slower than otherwise.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))
