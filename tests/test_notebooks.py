"""Notebooks run from beginning to end, and are stored with the outputs of a full run."""

import importlib
import re

import pytest
from conftest import REPOSITORY

nbformat = pytest.importorskip("nbformat")
for package in ("nbclient", "ipykernel"):
    pytest.importorskip(package)

FOLDER = REPOSITORY / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TINY_SIX_STAGES = f"""
_BASE_: {REPOSITORY}/configs/coco/sparse_rcnn_R50_100pro_3x.yaml
MODEL:
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}
  FPN: {{OUT_CHANNELS: 32}}
  SparseRCNN: {{HIDDEN_DIM: 32, NHEADS: 4, DIM_FEEDFORWARD: 64, DIM_DYNAMIC: 8, NUM_PROPOSALS: 8}}
"""
SHORT = {
    "quickstart": {"ITERATIONS": 2},
    "own_data": {"ITERATIONS": 2, "IMAGES": 10},
    "label_assignment": {"ITERATIONS": 2, "IMAGES": 2},
    "official_checkpoints": {"CONFIG": "tiny.yaml", "SIZE": 96},
}


@pytest.fixture
def run_notebook(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("run_notebooks").run_notebook


def texts(notebook):
    """Text outputs of all cells."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name, tmp_path, monkeypatch, run_notebook):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(TINY_SIX_STAGES)
    notebook = run_notebook(FOLDER / f"{name}.ipynb", tmp_path, SHORT[name])
    text = texts(notebook)
    expected = {
        "quickstart": ("'AP50'", "Detector(SparseRCNN, 5 classes"),
        "own_data": ("Ready to train.", "report.html", "2 images, "),
        "label_assignment": ("Hungarian", "NMS on: ", "background"),
        "official_checkpoints": ("80 classes: person, bicycle", "2 stages: ", "True"),
    }
    for part in expected[name]:
        assert part in text


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_has_its_outputs_and_nothing_of_the_machine(name):
    content = (FOLDER / f"{name}.ipynb").read_text()
    notebook = nbformat.reads(content, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not re.search(r"/(home|root|work|tmp|usr)/", texts(notebook))
    assert len(content) < 1_000_000


def test_a_parameter_that_a_notebook_lacks_is_an_error(tmp_path, run_notebook):
    with pytest.raises(KeyError, match="has no parameter EPOCHS"):
        run_notebook(FOLDER / "quickstart.ipynb", tmp_path, {"EPOCHS": 1})
