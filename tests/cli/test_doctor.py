"""``dsrcnn doctor``: every problem of an installation has a line with its cure."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision

import dsrcnn_command
from dsrcnn.analysis import environment
from dsrcnn.analysis.environment import Check
from dsrcnn.cli import doctor
from dsrcnn.cli.main import main

GIB = 2**30


def test_this_installation_can_train_and_every_package_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("python", "torch", "torchvision on cpu", f"training on {device}", "writing"):
        assert checks[name]["status"] == "ok", checks[name]
    assert {"detectron2", "pip", "opencv", "numpy", "Pillow", "timm", "albumentations"} < set(
        checks
    )
    assert {"faster-coco-eval", "supervision", "cpu", "memory", "shared memory"} < set(checks)
    assert torch.__version__ in checks["torch"]["text"]
    assert status == (report["problems"] > 0)  # a small machine may have some
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("checks", "status", "end"), [
    ([Check("torch", "ok", "2.9")], 0, "torch  2.9\n\nNo problems.\n"),
    ([Check("timm", "note", "absent", "pip install x")], 0,
     "timm  absent\n\nnote: timm: absent. pip install x\n\nNo problems.\n"),
    ([Check("pip", "problem", "26.3", "pip install y"), Check("a", "note", "no cure")], 1,
     "pip  26.3\na    no cure\n\nproblem: pip: 26.3. pip install y\n"),
])  # fmt: skip
def test_problems_come_last_and_decide_the_status(checks, status, end, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "inspect_environment", lambda: checks)
    assert main(["doctor"]) == status
    assert capsys.readouterr().out == end


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in the machine that torch does not use."""
    monkeypatch.setattr(environment, "gpu_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_torch_does_not_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = environment.check_torch()
    assert check.status == "problem"
    assert "Update the driver" in check.cure
    monkeypatch.setattr(torch.version, "cuda", None)
    check = environment.check_torch()
    assert check.status == "problem"
    assert "without CUDA" in check.text
    assert "Install torch and torchvision" in check.cure


@pytest.mark.usefixtures("gpu")
def test_a_hidden_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = environment.check_torch()
    assert check.status == "note"
    assert "CUDA_VISIBLE_DEVICES is ''" in check.text


def test_torch_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_files", list)
    assert environment.check_torch().status == "ok"


@pytest.mark.parametrize(("capability", "builds", "runs"), [
    ((8, 6), ["sm_80"], True),  # binaries run on later GPUs of a generation
    ((8, 0), ["sm_86"], False),
    ((9, 0), ["sm_80"], False),
    ((9, 0), ["sm_80", "compute_80"], True),  # compiled when it is loaded
    ((12, 0), ["sm_90", "sm_120"], True),
    ((6, 1), ["sm_75", "compute_75"], False),
    ((9, 0), ["sm_90a"], False),
])  # fmt: skip
def test_a_gpu_needs_code_for_its_compute_capability(capability, builds, runs):
    assert environment.runs_on(capability, builds) == runs


def test_every_gpu_is_named_with_memory_and_capability(monkeypatch):
    device = types.SimpleNamespace(name="Old card", total_memory=12 * GIB, major=6, minor=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61", "sm_70"])
    text = "Old card, 12 GiB, compute capability 6.1"
    assert environment.check_gpus() == [Check("cuda:0", "ok", text)]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70"])
    assert environment.check_gpus()[0].status == "problem"


def test_operators_of_torchvision_that_fail_or_err_are_a_problem(monkeypatch):
    def absent(*_):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    for nms in (absent, lambda *_: torch.tensor([0, 1])):
        monkeypatch.setattr(torchvision.ops, "nms", nms)
        check = environment.check_torchvision("cpu")
        assert check.status == "problem"
        assert "nms" in check.text
        assert "more" not in check.text
        assert torch.__version__ in check.cure
        assert "Reinstall both" in check.cure


def test_a_model_that_does_not_train_is_a_problem(monkeypatch):
    def fail(cfg):
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(environment, "build_model", fail)
    check = environment.check_training("cpu")
    assert (check.status, check.text) == ("problem", "RuntimeError: CUDA error: no kernel image")


def install(monkeypatch, **versions):
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(environment, "package_version", named.get)


@pytest.mark.parametrize(("pip", "others", "status"), [
    ("26.2", {"pb1_detectron2": "0.6"}, "ok"),
    ("26.3", {"pb1_detectron2": "0.6"}, "problem"),
    ("27.0.1", {"pb1_detectron2": "0.6"}, "problem"),
    ("26.3", {"detectron2": "0.6"}, "ok"),  # upstream's or conda-forge's
    (None, {"pb1_detectron2": "0.6"}, "ok"),
])  # fmt: skip
def test_pip_that_refuses_detectron2_is_a_problem(pip, others, status, monkeypatch):
    install(monkeypatch, pip=pip, **others)
    check = environment.check_pip()
    assert check.status == status
    assert ("'pip<26.3'" in check.cure) == (status == "problem")


def test_two_opencv_are_a_problem_and_a_missing_option_is_a_note(monkeypatch):
    install(monkeypatch, opencv_python="4.9", opencv_python_headless="5.0", timm="1.0")
    check = environment.check_opencv()
    assert check.status == "problem"
    assert "pip uninstall opencv-python opencv-python-headless" in check.cure
    assert environment.check_optional("timm") == Check("timm", "ok", "1.0")
    check = environment.check_optional("supervision")
    assert (check.status, check.cure) == ("note", "pip install 'dsrcnn[predict]'")


@pytest.mark.parametrize(("threads", "variable", "status"), [
    (4, None, "ok"), (8, None, "problem"), (2, None, "ok"), (2, "2", "note"),
])  # fmt: skip
def test_more_threads_than_cpus_are_a_problem(threads, variable, status, monkeypatch):
    monkeypatch.setattr(environment, "usable_cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    check = environment.check_threads()
    assert check.status == status
    assert ("OMP_NUM_THREADS=4" in check.cure) == (status != "ok")


def test_the_quota_of_a_container_limits_the_cpus(tmp_path):
    quota = tmp_path / "cpu.max"
    all_cpus = environment.usable_cpus(quota)  # no such file
    quota.write_text("max 100000\n")
    assert environment.usable_cpus(quota) == all_cpus
    quota.write_text("90000 100000\n")
    assert environment.usable_cpus(quota) == 1


@pytest.mark.parametrize(("free", "shared", "disk"), [
    (0.5, "problem", "problem"), (1.5, "ok", "problem"), (5, "ok", "note"), (20, "ok", "ok"),
])  # fmt: skip
def test_little_shared_memory_or_disk_is_a_problem(free, shared, disk, monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=free * GIB)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage)
    check = environment.check_shared_memory(str(tmp_path))
    assert check.status == shared
    assert ("DATALOADER.NUM_WORKERS 0" in check.cure) == (shared == "problem")
    assert environment.check_disk(tmp_path).status == disk
    assert environment.check_shared_memory(str(tmp_path / "nothing")).status == "ok"


def test_little_memory_is_a_problem(monkeypatch):
    memory = {"MemAvailable": GIB, "MemTotal": 8 * GIB}
    monkeypatch.setattr(environment, "read_meminfo", lambda: memory)
    check = environment.check_memory()
    assert (check.status, check.text) == ("problem", "1.0 GiB available of 8.0")
    monkeypatch.setattr(environment, "read_meminfo", dict)
    assert environment.check_memory().status == "ok"


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert environment.check_writing(file).status == "problem"
    assert environment.check_writing(tmp_path).status == "ok"


@pytest.mark.parametrize(("error", "cure"), [
    (RuntimeError("operator torchvision::nms does not exist"), "torch and torchvision in one"),
    (ImportError("libGL.so.1: cannot open shared object file"), "opencv-python-headless"),
    (ImportError("Detectron2 is not installed. Run `make setup`"), "docs/INSTALL.md"),
    (TypeError("anything"), "By symptom"),
])  # fmt: skip
def test_a_package_that_cannot_be_imported_is_diagnosed(error, cure, capsys, monkeypatch):
    def fail(name):
        raise error

    broken = types.ModuleType("dsrcnn.cli.main")
    broken.__getattr__ = fail
    monkeypatch.setitem(sys.modules, "dsrcnn.cli.main", broken)
    assert dsrcnn_command.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"problem: import dsrcnn: {type(error).__name__}: {error}" in printed
    assert cure in printed
    assert f"torch  {torch.__version__.partition('+')[0]}" in printed
    assert dsrcnn_command.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][-1]["status"] == "problem"
    with pytest.raises(type(error)):
        dsrcnn_command.main(["eval"])
