"""Paired comparison: variants measured in turn, so that a busy machine slows all of them alike."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from dsrcnn.errors import ConfigError

__all__ = ["Measurement", "Variant", "compare", "format_table"]

_WORKER = Path(__file__).with_name("worker.py")


class Variant(NamedTuple):
    """What to measure.

    Attributes:
        name: for the table.
        config: YAML file or shipped name.
        opts: ``KEY, VALUE, ...``.
        checkout: folder of another checkout of this package, None for the one in use.
        without: optimisations to undo: norms, layout, pooling, optimizer.
    """

    name: str
    config: str
    opts: Sequence[str] = ()
    checkout: str | None = None
    without: Sequence[str] = ()


class Measurement(NamedTuple):
    """Rounds of one variant, each a dictionary of seconds (and MiB) by part."""

    variant: Variant
    rounds: list[dict[str, float]]

    def median(self, part: str) -> float:
        """Median over the rounds, NaN for a part the variant does not have."""
        return median(r.get(part, float("nan")) for r in self.rounds)


def compare(
    variants: Sequence[Variant],
    *,
    mode: str,
    images: int = 2,
    height: int = 480,
    width: int = 640,
    objects: int = 7,
    repeats: int = 7,
    threads: int = 0,
) -> list[Measurement]:
    """Measure variants in turn: A, B, A, B, ...

    Args:
        variants: one or more.
        mode: "train" or "inference".
        images: batch size.
        height: of every image in pixels.
        width: of every image in pixels.
        objects: ground truths per image.
        repeats: rounds.
        threads: of torch; 0 leaves its choice.

    Raises:
        ConfigError: if a worker cannot start.
    """
    shape = {"images": images, "height": height, "width": width, "objects": objects}
    options = [f"--{k}={v}" for k, v in {"mode": mode, **shape, "threads": threads}.items()]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(v, options)) for v in variants]
        measured = [Measurement(v, []) for v in variants]
        for _ in tqdm(range(repeats), desc=mode, disable=None):
            for worker, measurement in zip(workers, measured, strict=True):
                measurement.rounds.append(_ask(worker, measurement.variant))
    return measured


@contextlib.contextmanager
def _started(variant: Variant, options: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = dict(os.environ)
    if variant.checkout:
        environment["PYTHONPATH"] = str(Path(variant.checkout).resolve())
    command = [sys.executable, "-W", "ignore", str(_WORKER), "--config-file", variant.config]
    process = subprocess.Popen(
        [*command, *options, f"--without={','.join(variant.without)}", *variant.opts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _ask(worker: subprocess.Popen[str], variant: Variant) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write("\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it stopped; there is nothing to read either
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise ConfigError(f"Variant {variant.name!r} could not be measured; see its messages above.")


def format_table(measured: Sequence[Measurement]) -> str:
    """Medians of every part in milliseconds and, with two variants, how many times faster A is.

    The factor is the median of the factors of the rounds, which pairs neighbours in time.
    """
    first = measured[0]
    parts = [p for p in first.rounds[0] if any(p in m.rounds[0] for m in measured)]
    parts += [p for m in measured[1:] for p in m.rounds[0] if p not in parts]
    rows = []
    for part in parts:
        scale = 1.0 if "MiB" in part else 1000.0
        row: list[object] = [part, *(m.median(part) * scale for m in measured)]
        if len(measured) == 2:
            pairs = zip(first.rounds, measured[1].rounds, strict=True)
            factors = [b[part] / a[part] for a, b in pairs if part in b and a.get(part)]
            row.append(median(factors) if factors else float("nan"))
        rows.append(row)
    headers = ["part (ms)", *(m.variant.name for m in measured)]
    headers += ["B / A"] if len(measured) == 2 else []
    return tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".2f"), tablefmt="pipe")
