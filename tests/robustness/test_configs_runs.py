"""Surroundings of a run: full disks, output folders, pictures that show nothing."""

import logging
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, QUICK, REPOSITORY, SMALL, quick_cfg, refusal

from dsrcnn.cli.main import main
from dsrcnn.engine.console import configure_logging
from dsrcnn.engine.main import CommandParser, add_train_arguments, exit_status, run
from dsrcnn.engine.writers import FileWriter, build_writers
from dsrcnn.errors import ConfigError
from dsrcnn.utils.files import prepare_file, prepare_folder

full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")


@full_disk
def test_a_log_on_a_full_disk_is_one_line(tmp_path, capfd):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    configure_logging(tmp_path, verbose=False)
    for number in range(5):
        logging.getLogger("dsrcnn").info("message %d", number)
    for handler in logging.getLogger("dsrcnn").handlers:
        handler.close()
    printed = capfd.readouterr()
    assert printed.out.count("message") == 5
    assert printed.err == f"{tmp_path}/log.txt cannot be written: No space left on device.\n"


@full_disk
def test_a_message_for_a_full_stdout_is_one_line(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        configure_logging(tmp_path, verbose=False)
        for number in range(5):
            logging.getLogger("dsrcnn").info("message %d", number)
        assert exit_status(lambda: 0) == 0
    assert capsys.readouterr().err == "error: Output cannot be written: No space left on device.\n"
    assert (tmp_path / "log.txt").read_text().count("message") == 5


@full_disk
def test_a_run_goes_on_without_scalars_that_find_no_room(tmp_path, capsys):
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    options = [*SMALL, "OUTPUT_DIR", str(tmp_path), "LOG.PERIOD", "1", "DATASETS.TEST", "()"]
    assert run([*QUICK, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 1
    assert "Scalars cannot be written to OUTPUT_DIR" in printed


def test_a_writer_says_once_that_it_fails(messages):
    def fail():
        raise OSError(28, "No space left on device")

    writer = FileWriter(SimpleNamespace(write=fail, close=fail))
    writer.write()
    writer.write()
    writer.close()
    (message,) = messages()
    assert "No space left on device" in message


def test_the_console_is_the_first_writer(tmp_path):
    console, *files = build_writers(quick_cfg(tmp_path), max_iter=2)
    assert not isinstance(console, FileWriter)
    assert all(isinstance(writer, FileWriter) for writer in files)
    for writer in files:
        writer.close()


@pytest.mark.parametrize(("name", "phrase"), [
    ("", "is ''; write the path of a folder"), (" ", "is ' '"), ("a\0b", "write the path"),
    ("file", "which is a file"), ("file/x", "Not a directory"), ("x" * 300, "File name too long"),
    ("/proc/1/x", "cannot be written to"), ("/sys", "cannot be written to"),
])  # fmt: skip
def test_a_folder_that_takes_nothing_is_one_message(tmp_path, monkeypatch, name, phrase):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=re.escape(phrase)) as caught:
        prepare_folder(name, "OUTPUT_DIR")
    assert "OUTPUT_DIR is" in str(caught.value)


def test_folders_and_files_that_can_be_written_are_left_as_they_are(tmp_path):
    folder = prepare_folder(tmp_path / "new/folder", "OUTPUT_DIR")
    assert prepare_folder(folder, "OUTPUT_DIR") == folder
    assert prepare_file(folder / "a.PNG", "--output", (".png",)) == folder / "a.PNG"
    assert not os.listdir(folder)


def test_predictions_that_show_nothing_say_so_with_the_best_score(tmp_path, capsys):
    output = tmp_path / "out"
    options = [*SMALL, "OUTPUT_DIR", str(output), "LOG.IMAGES", "0", "DATASETS.TEST", "()"]
    assert run([*QUICK, *options]) == 0
    capsys.readouterr()
    test = ["DATASETS.TEST", "('shapes_val',)", "--images", "2", "--threshold", "1"]
    assert main(["draw", "predictions", str(output), *test]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"2 pictures in .*; none shows .* best score is [\d.e-]+, below", line)


def test_an_unwritable_picture_is_one_message(tmp_path, capsys):
    (tmp_path / "augmented.png").mkdir()
    arguments = ["draw", "augmented", *QUICK, *SMALL, "--images", "1", "--output", tmp_path]
    assert "augmented.png cannot be written: Is a directory" in refusal(capsys, *arguments)


@pytest.mark.parametrize(("target", "status", "text"), [
    pytest.param("/dev/full", 2, "error: Output cannot be written: No space", marks=full_disk),
    (None, 141, ""),
])  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_takes_ends_a_command_plainly(target, status, text, unbuffered):
    if target is None:
        end, output = os.pipe()
        os.close(end)
    else:
        output = os.open(target, os.O_WRONLY)
    words = [sys.executable, "dsrcnn_command.py", "--help"]
    options = {"cwd": REPOSITORY, "env": {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}}
    done = subprocess.run(
        words, stdout=output, stderr=subprocess.PIPE, text=True, check=False, **options
    )
    os.close(output)
    assert done.returncode == status
    assert done.stderr.startswith(text)
    assert done.stderr.count("\n") == bool(text)


def test_a_broken_pipe_is_quiet(capsys):
    def work():
        raise BrokenPipeError

    assert exit_status(work) == 141
    assert not capsys.readouterr().err


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path, monkeypatch):
    with open(tmp_path / "printed", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        configure_logging(tmp_path, verbose=False)
        logging.getLogger("dsrcnn").info("class K\u00e4fer")
        print("K\u00e4fer")
    assert (tmp_path / "printed").read_text().count(r"K\xe4fer") == 2
    assert "K\u00e4fer" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["dsrcnn_command.py", "train"], ["train_net.py"]])
def test_an_interrupt_during_imports_is_one_line(words):
    # The import of the package waits for the signal.
    code = (
        "import runpy, signal, sys, time; from importlib.abc import MetaPathFinder as M\n"
        "class Slow(M):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'dsrcnn': print('ready', flush=True); time.sleep(60)\n"
        f"sys.meta_path.insert(0, Slow()); sys.argv = {words}; sys.path.insert(0, '')\n"
        f"runpy.run_path({words[0]!r}, run_name='__main__')"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, **streams
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "Interrupted.\n"


@pytest.mark.parametrize("name", ["log.txt", "metrics.json", "inference"])
def test_what_is_in_the_way_of_a_run_is_refused_at_the_start(tmp_path, capsys, name):
    if name == "inference":
        (tmp_path / name).touch()
    else:
        os.mkfifo(tmp_path / name)
    message = refusal(capsys, "train", *QUICK, *SMALL, "OUTPUT_DIR", tmp_path)
    kind = "a file, not a folder" if name == "inference" else "a named pipe, not a file"
    assert f"where {name} is {kind}" in message


def test_an_overwriting_run_that_cannot_start_leaves_the_other_one(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("SEED: 5\n")
    (tmp_path / "model_final.pth").write_bytes(b"weights")
    options = [*SMALL, "OUTPUT_DIR", tmp_path, "--overwrite", "MODEL.WEIGHTS", tmp_path / "nothing"]
    assert main(["train", *QUICK, *map(str, options)]) == 2
    assert "nothing' do not exist" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "SEED: 5\n"
    assert (tmp_path / "model_final.pth").read_bytes() == b"weights"


@pytest.mark.parametrize("words", [[], ["--config-file", "quick/sparse_rcnn_shapes"]])
def test_the_demo_overwrites_only_its_own_folder(tmp_path, monkeypatch, words):
    seen = []
    monkeypatch.setattr(
        "dsrcnn.cli.main.launch", lambda args: seen.append((args.overwrite, args.opts)) or 3
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"OUTPUT_DIR: {tmp_path}\n")
    assert main(["demo", *words]) == 3
    assert main(["demo", "--config-file", str(mine)]) == 3
    assert main(["demo", *words, "OUTPUT_DIR", str(tmp_path)]) == 3
    own = ["OUTPUT_DIR", "output/demo"]  # no folder of a config: dsrcnn train writes to those
    given = ["OUTPUT_DIR", str(tmp_path)]
    assert seen == [(True, own), (False, []), (False, given)]


@pytest.mark.parametrize(("words", "config", "place", "opts"), [
    (["--config-file", "MODEL.yaml", "SEED", "3"], "MODEL.yaml", None, ["SEED", "3"]),
    (["--conf", "TEST.yaml"], "TEST.yaml", None, []),
    (["SEED"], None, "SEED", []),
    (["MODEL.run", "MODEL.DEVICE", "cpu"], None, "MODEL.run", ["MODEL.DEVICE", "cpu"]),
    (["OUTPUT_DIR", "--resume"], None, "OUTPUT_DIR", []),
    (["run", "SEED", "-1", "--resume"], None, "run", ["SEED", "-1"]),
    (["run", "MODEL.DEVISE", "cpu"], None, "run", ["MODEL.DEVISE", "cpu"]),
])  # fmt: skip
def test_a_name_that_begins_like_a_key_is_a_name(words, config, place, opts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL.run").mkdir()
    parser = CommandParser()
    add_train_arguments(parser)
    parser.add_argument("place", nargs="?")
    args = parser.parse_overrides(words)
    assert (args.config_file, args.place, args.opts) == (config, place, opts)


def test_a_broken_connection_has_its_traceback_in_the_log_only(tmp_path, capsys):
    configure_logging(tmp_path, verbose=False)
    try:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    except RuntimeError:
        logging.getLogger("detectron2.engine.train_loop").exception("Exception during training:")
    assert not capsys.readouterr().out
    assert "Connection closed by peer" in (tmp_path / "log.txt").read_text()
