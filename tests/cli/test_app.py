"""``dsrcnn app``: starts, says where, ends; errors before it starts."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from conftest import ENVIRONMENT, refusal

gradio = pytest.importorskip("gradio")


def test_the_page_is_served_on_this_machine_until_it_is_ended(model_file, photos, tmp_path):
    command = [sys.executable, "-m", "dsrcnn_command", "app", "--model", str(model_file)]
    command += ["--samples", str(photos), "--device", "cpu"]
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
        try:
            lines = [process.stdout.readline()]
            while lines[-1] and "Ctrl-C" not in lines[-1]:
                lines.append(process.stdout.readline())
            assert "No view of assignments: the data are not known; write --data." in lines[0]
            found = re.match(r"(http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)", lines[-1])
            assert found, lines
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert b"dsrcnn" in opener.open(found[1], timeout=60).read()
            assert any(name.startswith("dsrcnn_app_") for name in os.listdir(tmp_path))
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
            assert "Traceback" not in rest
        finally:
            process.kill()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("dsrcnn_app_")]


def test_a_port_that_is_taken_is_one_error(model_file, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("app", "--model", model_file, "--port", port, "--device", "cpu")
        assert f"Port {port} is not free; write another number" in refusal(capsys, *words)


def test_missing_models_folders_and_packages_are_one_error_each(
    model_file, tmp_path, capsys, monkeypatch
):
    assert "write --model" in refusal(capsys, "app")
    words = ("app", "--model", model_file, "--device", "cpu")
    assert "is no folder" in refusal(capsys, *words, "--samples", tmp_path / "gone")
    assert "has no image" in refusal(capsys, *words, "--samples", tmp_path)
    assert "gone" in refusal(capsys, *words, "--data", tmp_path / "gone")
    monkeypatch.setattr("dsrcnn.cli.app.find_spec", lambda name: None)
    assert "pip install 'dsrcnn[app]'" in refusal(capsys, *words)
