"""Surroundings of a run: full disks, output folders, pictures that show nothing."""

import logging
import os
import re
from types import SimpleNamespace

import pytest
from conftest import QUICK, SMALL, quick_cfg, refusal

from dsrcnn.engine.console import configure_logging
from dsrcnn.engine.main import run
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
    from dsrcnn.cli.main import main

    test = ["DATASETS.TEST", "('shapes_val',)", "--images", "2", "--threshold", "1"]
    assert main(["draw", "predictions", str(output), *test]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"2 pictures in .*; none shows .* best score is [\d.e-]+, below", line)


def test_an_unwritable_picture_is_one_message(tmp_path, capsys):
    (tmp_path / "augmented.png").mkdir()
    arguments = ["draw", "augmented", *QUICK, *SMALL, "--images", "1", "--output", tmp_path]
    assert "augmented.png cannot be written: Is a directory" in refusal(capsys, *arguments)
