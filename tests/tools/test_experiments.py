"""The runner of experiments: once each, several at a time, within a time limit, continued."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import cv2
import pytest
from conftest import REPOSITORY

from dsrcnn.config import read_cfg

# Stands for training: writes two rows, in as many seconds as the option SLEEP says. When it is
# told to stop it leaves a file, like the checkpoint of a training run.
FAKE = """
import json, pathlib, signal, sys, time
rows, name, config, seed = sys.argv[4], *sys.argv[6:9]
opts = dict(zip(sys.argv[9::2], sys.argv[10::2]))
whole = lambda value: "".join(value.split())
def stop(*_):
    pathlib.Path(rows).with_name("stopped").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("started", seed, flush=True)
if opts.get("FAIL"):
    print("error: no such key")
    sys.exit(2)
time.sleep(float(opts.get("SLEEP", 0)))
keys = "AP AP50 AP75 APs APm APl AP90 duplicates s_per_it".split()
values = dict.fromkeys(keys, f"{10.0 * int(seed):.2f}")
opts = " ".join(map(whole, sys.argv[9:]))
row = {"set": name, "config": config, "seed": int(seed), "opts": opts, **values,
       "iterations": 5, "minutes": "1.0", "machine": "m", "torch": "t", "revision": "r"}
pathlib.Path(rows).write_text(json.dumps([{**row, "nms": nms} for nms in ("off", "on")]))
"""

# Keys and configs of ideas that did not help: docs/results.csv keeps their runs, of revisions that
# had them.
REMOVED = ("CLASS_TARGET", "DLA.ROUTE", "_aux_")


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """The script, with a fake training run, writing to a temporary folder."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    module = importlib.import_module("experiments")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(module, "SCRIPT", tmp_path / "fake.py")
    monkeypatch.setattr(importlib.import_module("experiment_run"), "ROOT", tmp_path)
    return module


def run(experiments, folder, *arguments):
    common = ["--data", str(folder), "--results", str(folder / "results.csv")]
    return experiments.main([*common, *map(str, arguments)])


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_experiments_run_once_each_and_are_averaged_over_seeds(experiments, tmp_path, capsys):
    grid = ("--sets", "a", "--configs", "c", "--seeds")
    for seeds, started in (((1,), 1), ((1, 3), 1), ((1, 3), 0)):
        assert run(experiments, tmp_path, *grid, *seeds) == 0
        output = capsys.readouterr().out
        assert output.count("started") == started
    assert [r["AP"] for r in rows_of(tmp_path)] == ["10.00", "10.00", "30.00", "30.00"]
    assert "| a | c | on | m | 1, 3 | 20.0 ± 14.1 |" in output
    picture = tmp_path / "results.png"
    run(experiments, tmp_path, "--plot", picture)
    assert cv2.imread(str(picture)).std() > 5


def test_a_file_names_experiments_and_further_options_are_part_of_their_names(
    experiments, tmp_path
):
    file = tmp_path / "list.txt"
    file.write_text("# first\na small/c 1 A.B 3\n\na small/c 2 A.B '(1, 2)'  # second\n")
    assert run(experiments, tmp_path, "--list", file, "--opts", "C", "4") == 0
    assert [(r["seed"], r["opts"]) for r in rows_of(tmp_path)][::2] == [
        ("1", "A.B 3 C 4"), ("2", "A.B (1,2) C 4"),
    ]  # fmt: skip
    listed = [e._replace(opts=(*e.opts, "C", "4")) for e in experiments.read_experiments(file)]
    assert experiments.unfinished(listed, tmp_path / "results.csv") == []
    row = {"config": "small/c", "opts": "A.B (1,2) C 4"}
    assert importlib.import_module("draw_results")._label(row) == "c\nB (1,2), C 4"


def test_long_labels_of_the_chart_are_wrapped(experiments):
    label = importlib.import_module("draw_results")._label
    row = {"config": "small/c", "opts": " ".join(f"A.KEY_{i} {i}" for i in range(9))}
    lines = label(row).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 48
    assert " ".join(lines) == "c " + ", ".join(f"KEY_{i} {i}" for i in range(9))


def test_labels_of_the_chart_do_not_overlap(experiments):
    labels = ["a", "b\nc", "d" + 4 * "\ne", "f"]
    places, height = importlib.import_module("draw_results")._place(labels)
    # Two lines are a unit: 1 for each of the first two, 2.5 for the third.
    assert list(places.values()) == [0, 1, 2.75, 4.5]
    assert height == 5.5


@pytest.mark.parametrize(("arguments", "shown"), [
    ((), ["a c", "a d", "b c"]),
    (("--sets", "a"), ["a c", "a d"]),
    (("--configs", "c"), ["a c", "b c"]),
    (("--sets", "a", "--configs", "[cx]", "e*"), ["a c"]),
])  # fmt: skip
def test_the_table_is_of_the_datasets_and_configs_asked_for(
    experiments, tmp_path, capsys, arguments, shown
):
    file = tmp_path / "list.txt"
    file.write_text("a c 1\na d 1\nb c 1\n")
    run(experiments, tmp_path, "--list", file, "--jobs", 3)
    capsys.readouterr()
    assert run(experiments, tmp_path, "--table", *arguments) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted({f"{line[0][2:]} {line[1]}" for line in lines}) == shown


def test_a_selection_without_rows_is_an_error_that_names_it(experiments, tmp_path, capsys):
    run(experiments, tmp_path, "--sets", "a", "--configs", "c", "--seeds", 1)
    with pytest.raises(SystemExit):
        run(experiments, tmp_path, "--plot", tmp_path / "x.png", "--configs", "d")
    assert "no row of --sets * --configs d; --table alone" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["a c", "a c one", "a c 1 KEY", "a c 1 'KEY"])
def test_lines_that_are_no_experiments_are_refused(experiments, tmp_path, line):
    file = tmp_path / "list.txt"
    file.write_text(f"a c 1\n{line}\n")
    with pytest.raises(
        SystemExit, match=r"line 2: .* is no experiment; write dataset, config, see"
    ):
        experiments.read_experiments(file)


def test_jobs_run_at_the_same_time_and_rows_are_written_as_each_ends(experiments, tmp_path):
    """The first takes longest, so its row is the last one."""
    file = tmp_path / "list.txt"
    file.write_text("a c 1 SLEEP 3\na c 2\na c 3\n")
    start = time.monotonic()
    thread = threading.Thread(target=run, args=(experiments, tmp_path, "--list", file, "--jobs", 3))
    thread.start()
    while not (tmp_path / "results.csv").is_file() and time.monotonic() < start + 20:
        time.sleep(0.05)
    assert "1" not in {r["seed"] for r in rows_of(tmp_path)}
    thread.join()
    assert [r["seed"] for r in rows_of(tmp_path)][-1] == "1"


def test_runs_stop_at_the_limit_and_the_same_command_continues_them(experiments, tmp_path, capsys):
    listed = ("--sets", "a", "--configs", "c", "--seeds", 1, 2, "--opts", "SLEEP", "60")
    assert run(experiments, tmp_path, *listed, "--seconds", 3) == 0
    output = capsys.readouterr().out
    assert "stopped, to be continued: a c 1 SLEEP 60" in output
    assert "0 of 2 done, 0 failed" in output
    folder = experiments.Experiment("a", "c", 1, ("SLEEP", "60")).folder
    assert (folder / "stopped").is_file()  # the process had time to save its state
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_runs_save_their_state_even_in_the_background(experiments, tmp_path, number):
    code = (
        "import sys, pathlib, signal; sys.path.insert(0, sys.argv[1]); import experiments as e; "
        "import experiment_run; experiment_run.ROOT = pathlib.Path(sys.argv[2]); "
        "e.SCRIPT = experiment_run.ROOT / 'fake.py'; sys.exit(e.main(sys.argv[3:]))"
    )
    words = [sys.executable, "-c", code, str(REPOSITORY / "tools"), str(tmp_path), "--data", "."]
    words += ["--results", str(tmp_path / "r.csv"), "--sets", "a", "--configs", "c"]
    words += ["--seeds", "1", "--opts", "SLEEP", "60"]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells do for background jobs
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, ignored)
    folder = experiments.Experiment("a", "c", 1, ("SLEEP", "60")).folder
    log = folder / "experiment.log"
    end = time.monotonic() + 60
    while not (log.is_file() and "started" in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(number)
    assert "stopped, to be continued: a c 1 SLEEP 60" in process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert (folder / "stopped").is_file()


def test_a_failed_run_is_reported_and_others_go_on(experiments, tmp_path, capsys):
    file = tmp_path / "list.txt"
    file.write_text("a c 1 FAIL 1\na c 2\n")
    assert run(experiments, tmp_path, "--list", file) == 1
    output = capsys.readouterr().out
    assert "failed: a c 1 FAIL 1: error: no such key (" in output
    assert "1 of 2 done, 1 failed" in output
    assert [r["seed"] for r in rows_of(tmp_path)] == ["2", "2"]


def test_an_experiment_that_cannot_start_does_not_end_the_others(experiments, tmp_path, capsys):
    (tmp_path / "output/experiments/a").mkdir(parents=True)
    (tmp_path / "output/experiments/a/broken").write_text("a file in the place of the folder")
    file = tmp_path / "list.txt"
    file.write_text("a c 1\na broken 1\na c 2\n")
    assert run(experiments, tmp_path, "--list", file, "--jobs", 2) == 1
    assert "failed: a broken 1: " in capsys.readouterr().out
    assert {r["seed"] for r in rows_of(tmp_path)} == {"1", "2"}


def test_a_config_may_be_a_file_anywhere(experiments, tmp_path):
    folder = experiments.Experiment("a", "/data/mine.yaml", 1).folder
    assert folder == tmp_path / "output/experiments/a/data/mine/plain/seed1"


def test_results_with_other_columns_are_refused_before_training(experiments, tmp_path):
    (tmp_path / "results.csv").write_text("set,config,AP\n")
    with pytest.raises(SystemExit, match="has the columns set, config, AP, not set, config, opts"):
        run(experiments, tmp_path, "--sets", "a", "--configs", "c")
    assert not (tmp_path / "output").exists()


def test_machines_are_lines_of_their_own(experiments):
    row = {"set": "a", "config": "c", "opts": "", "nms": "on", "minutes": "30"}
    row |= dict.fromkeys(experiments.MEASURED, "5")
    rows = [{**row, "seed": "1", "machine": "cpu"}, {**row, "seed": "2", "machine": "gpu"}]
    assert [line.split(" | ")[3] for line in experiments.table(rows).splitlines()[2:]] == [
        "cpu",
        "gpu",
    ]


def test_threads_of_the_machine_are_shared_by_the_jobs(experiments, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "fake.py").write_text(FAKE + "\nimport os; print(os.environ['OMP_NUM_THREADS'])\n")
    run(experiments, tmp_path, "--sets", "a", "--configs", "c", "--seeds", 1, "--jobs", 4)
    log = experiments.Experiment("a", "c", 1).folder / "experiment.log"
    assert log.read_text().split() == ["started", "1", "2"]


def test_the_list_of_the_documentation_has_configs_and_keys_that_exist(experiments):
    listed = experiments.read_experiments(REPOSITORY / "docs/experiments.txt")
    assert len(listed) == len(set(listed)) > 100
    for config, opts in {(e.config, e.opts) for e in listed}:
        read_cfg(config, list(opts))


def test_the_list_has_every_run_of_the_documented_results_with_weights_of_imagenet(experiments):
    listed = experiments.read_experiments(REPOSITORY / "docs/experiments.txt")
    names = {(e.set, e.config, str(e.seed), " ".join(e.opts)) for e in listed}
    with (REPOSITORY / "docs/results.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if "lite0" in r["config"]]
    rows = [r for r in rows if not any(key in r["config"] + r["opts"] for key in REMOVED)]
    assert {(r["set"], r["config"], r["seed"], r["opts"]) for r in rows} <= names
