#!/usr/bin/env python
r"""Minutes of training until a target AP: one number that later versions must not worsen.

    dsrcnn train --config-file small/best_lite0 DATASETS.CUSTOM.FOLDER bccd \
        TEST.EVAL_PERIOD 50 OUTPUT_DIR output/bccd
    python tools/time_to_ap.py output/bccd --config small/best_lite0 \
        --results docs/minutes_to_ap.csv

Minutes are those of the iterations, without start and evaluations. Compare rows of one machine
only.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from experiment_run import machine, revision
from experiments import append_rows

import dsrcnn  # before detectron2

# isort: split
import torch

from dsrcnn.visualization.curves import read_metrics


class Reached(NamedTuple):
    """The first evaluation with at least the target AP.

    Attributes:
        ap: of that evaluation.
        iterations: trained until then.
        seconds: of an iteration, the median.
    """

    ap: float
    iterations: int
    seconds: float

    @property
    def minutes(self) -> float:
        """Time of the iterations."""
        return self.seconds * self.iterations / 60


def time_to_ap(entries: Sequence[dict[str, float]], target: float) -> Reached:
    """Find the first evaluation with at least `target` AP.

    Args:
        entries: of ``metrics.json``, see `read_metrics`.
        target: AP, 0 to 100.

    Raises:
        SystemExit: if no evaluation has it.
    """
    evaluated = [e for e in entries if "bbox/AP" in e]
    trained = [e for e in entries if "time" in e]
    last = max((e["iteration"] for e in trained), default=0)
    for entry in evaluated:
        if entry["bbox/AP"] >= target:
            # Iterations count from 0; the last evaluation has the number of all of them.
            iterations = int(entry["iteration"]) + (entry["iteration"] <= last)
            return Reached(entry["bbox/AP"], iterations, median(e["time"] for e in trained))
    best = max((e["bbox/AP"] for e in evaluated), default=float("nan"))
    raise SystemExit(
        f"No evaluation has an AP of {target:g}; the best of {len(evaluated)} has {best:.1f}. "
        "Train longer, or lower --target."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run, print the result and append it to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="output folder of the training run")
    parser.add_argument("--config", required=True, metavar="NAME", help="of the run, for the row")
    parser.add_argument("--target", type=float, default=45.0, help="AP (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file to append a row to")
    args = parser.parse_args(argv)
    reached = time_to_ap(read_metrics(args.run / "metrics.json"), args.target)
    row = {
        "version": dsrcnn.__version__,
        "revision": revision(),
        "config": args.config,
        "target": f"{args.target:g}",
        "AP": f"{reached.ap:.2f}",
        "iterations": reached.iterations,
        "s_per_it": f"{reached.seconds:.3f}",
        "minutes": f"{reached.minutes:.1f}",
        "machine": machine(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{k} {v}" for k, v in row.items()))
    if args.results:
        append_rows(args.results, [row], list(row))


if __name__ == "__main__":
    main()
