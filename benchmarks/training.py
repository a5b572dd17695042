"""What the options of training cost and save: precision, parts, checkpointing, compilation."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from tabulate import tabulate

from benchmarks.speed import Measurement, Variant, compare

__all__ = ["OPTIONS", "compare_options", "table_of_options"]

_DLA = ("MODEL.SparseRCNN.DLA.ENABLED", "True")
_DPG = ("MODEL.SparseRCNN.DPG.ENABLED", "True")
_SQR3 = ("MODEL.SparseRCNN.SQR.ENABLED", "True", "MODEL.SparseRCNN.SQR.START", "3")
_SQR1 = ("MODEL.SparseRCNN.SQR.ENABLED", "True", "MODEL.SparseRCNN.SQR.START", "1")
OPTIONS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bf16"),
    "fp16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"),
    "accumulate": ("SOLVER.ACCUMULATE", "2"),
    "checkpoint": ("MODEL.CHECKPOINT.BACKBONE", "True", "MODEL.CHECKPOINT.STAGES", "True"),
    "compile": ("MODEL.COMPILE", "True"),
    "dla": _DLA,
    "dpg": _DPG,
    "dla-dpg": (*_DLA, *_DPG),
    "sqr3": _SQR3,
    "sqr1": _SQR1,
    "dla-sqr3": (*_DLA, *_SQR3),
    "dla-sqr1": (*_DLA, *_SQR1),
}


def compare_options(
    config: str, names: Sequence[str], opts: Sequence[str] = (), **shape: Any
) -> list[Measurement]:
    """Measure iterations of the training loop in turn, one process for each option.

    Args:
        config: YAML file or shipped name.
        names: of `OPTIONS`.
        opts: ``KEY, VALUE, ...`` for all.
        **shape: of `compare`: images, height, width, objects, repeats, threads.
    """
    variants = [Variant(name, config, (*opts, *OPTIONS[name])) for name in names]
    return compare(variants, mode="loop", **shape)


def table_of_options(measured: Sequence[Measurement]) -> str:
    """Seconds and peak memory; ratios to the first, medians over rounds paired in time."""
    first = measured[0].rounds
    rows = []
    for m in measured:
        pairs = list(zip(m.rounds, first, strict=True))
        slower = median(a["iteration"] / b["iteration"] for a, b in pairs)
        memory = m.median("peak memory (MiB)")
        more = memory / measured[0].median("peak memory (MiB)")
        rows.append([m.variant.name, m.median("iteration"), slower, memory, more])
    headers = ["", "s / iteration", "ratio", "peak memory (MiB)", "ratio"]
    return tabulate(rows, headers, floatfmt=("", ".3f", ".2f", ".0f", ".2f"), tablefmt="pipe")
