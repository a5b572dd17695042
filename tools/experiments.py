#!/usr/bin/env python
r"""Run experiments, each once and several at a time, and collect their results in one CSV file.

An experiment is a dataset, a config, a seed and options. Those in the results file are not
repeated; interrupted ones resume from their last checkpoint. A dataset is a folder with
``images/{train,val}`` and ``annotations/instances_{train,val}.json``, or ``shapes``. A file of
experiments has one a line, with comments after #:

    bccd small/sparse_rcnn_dla_lite0_100pro 1 SOLVER.MAX_ITER 3000

    python tools/experiments.py --data DATA --sets bccd aquarium \
        --configs small/sparse_rcnn_lite0_100pro --seeds 1 2 3 --jobs 2
    python tools/experiments.py --data DATA --list docs/experiments.txt --jobs 6 --seconds 520
    python tools/experiments.py --table            # mean and standard deviation over seeds
    python tools/experiments.py --plot results.png # the same as a chart
    python tools/experiments.py --lengths lengths.png # AP over images seen and minutes

The last three take a part of the results by --sets, --configs and patterns such as "small/*lite0*".

Every experiment writes ``experiment.log`` into its folder below ``output/experiments``.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import NoReturn

from draw_lengths import draw_lengths
from draw_results import draw_results
from experiment_run import METRICS, ROOT, Experiment

MEASURED = [*METRICS, "duplicates", "s_per_it"]
FIELDS = ["set", "config", "opts", "seed", "nms", *MEASURED, "iterations", "minutes", "machine"]
FIELDS += ["torch", "revision"]
SCRIPT = Path(__file__).with_name("experiment_run.py")
_GRACE = 300.0  # seconds for saving the state of a training run, or for finishing an evaluation


def read_experiments(path: Path) -> list[Experiment]:
    """Read a file of experiments, one a line: dataset, config, seed, ``KEY VALUE ...``.

    Raises:
        SystemExit: for a line that is none.
    """
    experiments = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # of quotes
            words = [line]
        if not words:
            continue
        if len(words) < 3 or len(words) % 2 == 0 or not words[2].isdigit():
            raise SystemExit(
                f"{path}, line {number}: {line!r} is no experiment; write dataset, config, seed "
                "and KEY VALUE pairs."
            )
        experiments.append(Experiment(words[0], words[1], int(words[2]), tuple(words[3:])))
    return experiments


def read_results(path: Path) -> list[dict[str, str]]:
    """Read all rows, none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_header(path: Path, fields: Sequence[str] = FIELDS) -> None:
    """End the program if a CSV file exists and has other columns, as one of another version."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(fields):
        raise SystemExit(
            f"{path} has the columns {', '.join(header)}, not {', '.join(fields)}. Write another "
            "file."
        )


def append_rows(
    path: Path, rows: Sequence[dict[str, object]], fields: Sequence[str] = FIELDS
) -> None:
    """Append rows to a CSV file, below a header in a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_header(path, fields)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def unfinished(experiments: Sequence[Experiment], results: Path) -> list[Experiment]:
    """Return the experiments without a row, each once, in order."""
    done = {(r["set"], r["config"], r["seed"], r["opts"]) for r in read_results(results)}
    return [
        e
        for e in dict.fromkeys(experiments)
        if (e.set, e.config, str(e.seed), e.overrides) not in done
    ]


class Job:
    """A running experiment.

    Attributes:
        experiment: what runs.
        folder: of its log and rows.
    """

    def __init__(self, experiment: Experiment, data: Path, threads: int) -> None:
        """Start the process, in a group of its own that signals reach as a whole."""
        self.experiment, self.folder = experiment, experiment.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = self.folder / "rows.json"
        self._start = time.monotonic()
        self._rows.unlink(missing_ok=True)  # of an earlier attempt
        command = [
            sys.executable,
            str(SCRIPT),
            "--data",
            str(data),
            "--rows",
            str(self._rows),
            "--",
        ]
        command += [experiment.set, experiment.config, str(experiment.seed), *experiment.opts]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (self.folder / "experiment.log").open("a") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def minutes(self) -> float:
        """Wall time so far."""
        return (time.monotonic() - self._start) / 60

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def rows(self) -> list[dict[str, object]] | None:
        """Results of a process that has ended; None if it failed or was stopped."""
        if self._process.returncode or not self._rows.is_file():
            return None
        rows: list[dict[str, object]] = json.loads(self._rows.read_text())
        return rows

    def last_line(self) -> str:
        """Last line of the log."""
        lines = (self.folder / "experiment.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or [""])[-1]

    def stop(self) -> None:
        """Let training save its state and end; an evaluation is finished."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End what is left of the group."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run_all(
    experiments: Sequence[Experiment], data: Path, results: Path, *, jobs: int, seconds: float
) -> int:
    """Run experiments, `jobs` at a time, and append their rows as each ends.

    Args:
        experiments: in the order to start them.
        data: folder of the datasets.
        results: CSV file.
        jobs: processes at a time; they share the threads of the machine.
        seconds: limit after which training runs save their state and stop.

    Returns:
        Number of experiments that failed.
    """
    if threading.current_thread() is threading.main_thread():
        # Also in the background, where shells let programs ignore Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    check_header(results)  # before hours of training
    waiting = unfinished(experiments, results)
    end, failed, total = time.monotonic() + seconds, 0, len(waiting)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[Job] = []
    _say(f"{total} experiments, {jobs} at a time")
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < jobs:
                failed += _start(waiting.pop(0), running, data, threads)
            time.sleep(0.2)
            failed += _collect(running, results, stopped=False)
    finally:  # at the limit, or Ctrl-C
        stopping = time.monotonic()
        for job in running:
            job.stop()
        while running and time.monotonic() < stopping + _GRACE:
            failed += _collect(running, results, stopped=True)
            time.sleep(0.2)
        for job in running:
            job.kill()
    left = len(unfinished(experiments, results))
    _say(f"{total - left} of {total} done, {failed} failed")
    return failed


def _start(experiment: Experiment, running: list[Job], data: Path, threads: int) -> int:
    """Add an experiment to `running`; return 1 if it cannot start, which must not end others."""
    try:
        running.append(Job(experiment, data, threads))
    except OSError as error:
        _say(f"failed: {experiment}: {error}")
        return 1
    _say(f"started {experiment}")
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _collect(running: list[Job], results: Path, *, stopped: bool) -> int:
    """Take what has ended from `running`; return how many of them failed."""
    failed = 0
    for job in [job for job in running if job.ended()]:
        running.remove(job)
        rows = job.rows()
        if rows is not None:
            append_rows(results, rows)
            figures = ", ".join(f"AP {row['AP']} with NMS {row['nms']}" for row in rows)
            _say(f"done after {job.minutes:.1f} min: {job.experiment}: {figures}")
        elif stopped:
            _say(f"stopped, to be continued: {job.experiment}")
        else:
            failed += 1
            _say(f"failed: {job.experiment}: {job.last_line()} ({job.folder / 'experiment.log'})")
    return failed


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def selected(
    rows: Sequence[dict[str, str]], sets: Sequence[str], configs: Sequence[str]
) -> list[dict[str, str]]:
    """Return the rows of datasets and configs, names or patterns; none given stands for all."""
    wanted = {"set": sets or ["*"], "config": configs or ["*"]}
    return [
        row
        for row in rows
        if all(any(fnmatchcase(row[key], p) for p in patterns) for key, patterns in wanted.items())
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Format mean and standard deviation over seeds as Markdown, a line per variant and machine."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        variant = f"{row['config']} {row['opts']}".strip()
        groups[row["set"], variant, row["nms"], row["machine"]].append(row)
    headers = ["data", "config", "NMS", "machine", "seeds", *MEASURED, "minutes"]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for key, members in groups.items():
        seeds = ", ".join(sorted(m["seed"] for m in members))
        cells = [
            _mean_and_deviation([float(m[k] or "nan") for m in members], k) for k in headers[5:]
        ]
        lines.append("| " + " | ".join([*key, seeds, *cells]) + " |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float], name: str) -> str:
    if any(value != value for value in values):  # not measured
        return ""
    digits = {"s_per_it": 2, "duplicates": 2}.get(name, 1)
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments that have no results yet and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the datasets")
    parser.add_argument("--list", type=Path, metavar="FILE", help="file of experiments")
    parser.add_argument("--sets", nargs="+", default=[])
    parser.add_argument("--configs", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE ... for every experiment")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="experiments at a time")
    text = "stop after this time; the same command continues"
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help=text)
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results.csv")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="only draw the results into this file")
    text = "only draw AP over the length of the training into this file"
    parser.add_argument("--lengths", type=Path, metavar="FILE", help=text)
    args = parser.parse_args(argv)
    failed = 0
    only_shows = args.table or args.plot or args.lengths
    if not only_shows:
        if not args.data:
            parser.error("write --data, the folder of the datasets")
        if args.jobs < 1:
            parser.error(f"--jobs is {args.jobs}; write 1 or more")
        grid = itertools.product(args.seeds, args.sets, args.configs)
        experiments = [Experiment(s, c, seed, tuple(args.opts)) for seed, s, c in grid]
        listed = read_experiments(args.list) if args.list else []
        listed = [e._replace(opts=(*e.opts, *args.opts)) for e in listed]
        options = {"jobs": args.jobs, "seconds": args.seconds}
        try:
            failed = run_all([*listed, *experiments], args.data.resolve(), args.results, **options)
        except KeyboardInterrupt:
            _say("interrupted; the same command continues")
            return 130
    rows = read_results(args.results)
    if only_shows:
        rows = selected(rows, args.sets, args.configs)
        if not rows:
            parser.error(
                f"{args.results} has no row of --sets {' '.join(args.sets) or '*'} --configs "
                f"{' '.join(args.configs) or '*'}; --table alone shows all it has"
            )
    if args.lengths:
        draw_lengths(rows, args.lengths)
    elif args.plot:
        draw_results(rows, args.plot)
    else:
        print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
