"""The package as it is installed from a wheel, without the clone."""

import subprocess
import sys
import zipfile

import pytest
from conftest import ENVIRONMENT, REPOSITORY, run_program

from dsrcnn.config.load import shipped_configs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder with the content of a wheel that was built from the files under version control."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = ["git", "archive", "--format=zip", f"--output={folder / 'source.zip'}", "HEAD"]
    done = subprocess.run(archive, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no clone: {done.stderr}")
    with zipfile.ZipFile(folder / "source.zip") as source:
        source.extractall(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    run_program(*build, "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_has_all_configs_and_its_commands_run_without_the_clone(installed, tmp_path):
    code = (
        "import sys, dsrcnn, dsrcnn_command; from dsrcnn.config.load import shipped_configs; "
        "print(dsrcnn.__file__); print(dsrcnn_command.__file__); print(*shipped_configs()); "
        "dsrcnn.load_cfg('quick/sparse_rcnn_shapes'); sys.exit(dsrcnn_command.main(['--version']))"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}
    options = {"cwd": tmp_path, "env": environment}
    package, command, configs, *version = run_program(
        sys.executable, "-W", "ignore", "-c", code, **options
    ).splitlines()
    assert package == str(installed / "dsrcnn/__init__.py")
    assert command == str(installed / "dsrcnn_command.py")
    assert configs.split() == shipped_configs()
    assert "dsrcnn" in " ".join(version)
    assert (installed / "dsrcnn/py.typed").is_file()
