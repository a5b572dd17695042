"""Time and memory of training steps and inference, by part, of two configs or checkouts.

Variants are measured in turn, so that a busy machine slows all of them alike.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.counting import now
from benchmarks.worker import Shape, add_shape_arguments, at_least_one
from dsrcnn.errors import ConfigError

_WORKER = Path(__file__).with_name("worker.py")
_Name = TypeVar("_Name", bound=Hashable)
_Result = TypeVar("_Result")


class Variant(NamedTuple):
    """A model to measure.

    Attributes:
        name: for the table.
        config: YAML file or shipped name.
        opts: ``KEY, VALUE, ...``.
        checkout: folder of another checkout of this package, None for that of this file.
        without: optimizations to undo: norms, layout, pooling, optimizer.
        official: folder with the official code, whose model is measured instead; None for ours.
    """

    name: str
    config: str
    opts: Sequence[str] = ()
    checkout: str | None = None
    without: Sequence[str] = ()
    official: str | None = None


class Measurement(NamedTuple):
    """Rounds of one variant, and where they ran.

    Attributes:
        variant: which.
        rounds: seconds (and MiB) by part.
        device: name of the GPU, or CPU.
        package: file of the package that ran.
    """

    variant: Variant
    rounds: list[dict[str, float]]
    device: str = "CPU"
    package: str = ""

    def median(self, part: str) -> float:
        """Median over the rounds, NaN for a part the variant does not have."""
        return median(r.get(part, float("nan")) for r in self.rounds)


def measure_in_turn(
    runs: Mapping[_Name, Callable[[], _Result]], repeats: int, *, warm_up: int = 0
) -> dict[_Name, list[_Result]]:
    """Call A, B, A, B, ... and return the results by name, without those of `warm_up` rounds."""
    results: dict[_Name, list[_Result]] = {name: [] for name in runs}
    for _ in tqdm(range(warm_up + repeats), desc="measuring", disable=None):
        for name, run in runs.items():
            results[name].append(run())
    return {name: values[warm_up:] for name, values in results.items()}


def time_in_turn(
    runs: Mapping[_Name, Callable[[], object]], repeats: int
) -> dict[_Name, list[float]]:
    """Seconds of calls in turn, after one round to warm up."""
    timed = {name: partial(_seconds, run) for name, run in runs.items()}
    return measure_in_turn(timed, repeats, warm_up=1)


def _seconds(run: Callable[[], object]) -> float:
    start = now()
    run()
    return now() - start


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Median of the ratios of rounds, which pairs neighbors in time."""
    return median(a / b for a, b in zip(values, references, strict=True))


def compare(
    variants: Sequence[Variant],
    *,
    mode: str,
    shape: Shape,
    repeats: int,
    threads: int = 0,
) -> list[Measurement]:
    """Measure variants in turn, each in a separate process.

    Args:
        variants: one or more.
        mode: "train" or "inference", by part, "loop", iterations of the training loop, or "count",
            what an inference starts.
        shape: of the batch.
        repeats: rounds.
        threads: of torch; 0 leaves its choice.

    Raises:
        ConfigError: if a worker cannot start.
    """
    options = [f"--mode={mode}", f"--images={shape.images}", f"--objects={shape.objects}"]
    options += ["--size", str(shape.height), str(shape.width), f"--threads={threads}"]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(variant, options)) for variant in variants]
        pairs = [*zip(workers, variants, strict=True)]
        about = [_answer(*pair) for pair in pairs]  # all are built before the first is measured
        runs = {number: partial(_ask, *pair) for number, pair in enumerate(pairs)}
        rounds = measure_in_turn(runs, repeats)
    return [
        Measurement(variant, rounds[number], **about[number])
        for number, variant in enumerate(variants)
    ]


@contextlib.contextmanager
def _started(variant: Variant, options: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    # The package may be installed from elsewhere.
    checkout = Path(variant.checkout) if variant.checkout else Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-W", "ignore", str(_WORKER), f"--config-file={variant.config}"]
    options = [*options, f"--without={','.join(variant.without)}"]
    if variant.official:
        options.append(f"--official={Path(variant.official).resolve()}")
    process = subprocess.Popen(
        [*command, *options, *variant.opts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what `_ask` wrote after the worker stopped
            process.stdin.close()
        process.wait()


def _ask(worker: subprocess.Popen[str], variant: Variant) -> dict[str, float]:
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it stopped, so there is nothing to read either
        worker.stdin.write("\n")
        worker.stdin.flush()
    return _answer(worker, variant)


def _answer(worker: subprocess.Popen[str], variant: Variant) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise ConfigError(f"Variant {variant.name!r} could not be measured; see its messages above.")


def format_table(measured: Sequence[Measurement]) -> str:
    """Medians of every part in milliseconds and, with two variants, how many times faster A is."""
    first = measured[0]
    parts = list(dict.fromkeys(part for m in measured for part in m.rounds[0]))
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
    return tabulate(rows, headers, floatfmt=("", ".1f", ".1f", ".2f"), tablefmt="pipe")


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Declare a config, required without a default, and ``--set``."""
    text = f"YAML file or shipped name{f' (default: {default})' if default else ''}"
    parser.add_argument("--config-file", default=default, required=not default, help=text)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for every model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser)
    add_shape_arguments(parser)
    parser.add_argument("--against", help="config of variant B (default: that of A)")
    parser.add_argument("--checkout", help="folder of the checkout that A runs from")
    parser.add_argument("--against-checkout", help="folder of the checkout that B runs from")
    parser.add_argument("--against-opts", default="", help="'KEY VALUE ...' for B only")
    parser.add_argument(
        "--against-without",
        default="",
        metavar="NAMES",
        help="optimizations undone in B, comma separated: norms,layout,pooling,optimizer; all four "
        "are the common way of computing",
    )
    parser.add_argument(
        "--against-official",
        metavar="FOLDER",
        help="B is the official Sparse R-CNN: projects/SparseRCNN of a clone of its repository",
    )
    parser.add_argument("--mode", choices=["train", "inference", "both"], default="both")
    parser.add_argument("--repeats", type=at_least_one, default=7, help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")


def run(args: argparse.Namespace) -> None:
    """Print one table per mode."""
    first = Variant("A", args.config_file, args.set, args.checkout, [])
    second = Variant(
        "B",
        args.against or args.config_file,
        [*args.set, *shlex.split(args.against_opts)],
        args.against_checkout,
        [name for name in args.against_without.split(",") if name],
        args.against_official,
    )
    variants = [first] if second == first._replace(name="B") else [first, second]
    shape = Shape.from_args(args)
    for mode in ("train", "inference") if args.mode == "both" else (args.mode,):
        measured = compare(
            variants, mode=mode, shape=shape, repeats=args.repeats, threads=args.threads
        )
        print(f"\n{mode}: {shape}, {args.repeats} rounds, medians\n\n{format_table(measured)}")
