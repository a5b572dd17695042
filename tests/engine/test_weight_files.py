import errno
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from conftest import quick_cfg, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.cli.main import main
from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.engine.trainer import Trainer
from dsrcnn.engine.weight_io import read_pickle, read_weights, write_atomically
from dsrcnn.errors import CheckpointError, UnreadableWeightsError, WeightsError


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.getenv, ("HOME",)


def test_a_written_file_has_the_usual_permissions_and_no_remains(tmp_path):
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == b"new"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    assert len(modes) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("unexpected pos 64 vs 0")])  # fmt: skip
def test_a_full_disk_leaves_the_old_file_and_no_remains(tmp_path, error):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"old")

    def fill_up(file):
        file.write(b"half of the new")
        raise error

    with pytest.raises(CheckpointError, match="Earlier files are untouched"):
        write_atomically(path, fill_up)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="write another OUTPUT_DIR"):
        write_atomically(tmp_path / "gone" / "weights.pth", lambda file: None)


def test_training_continues_after_a_checkpoint_that_cannot_be_written(
    tmp_path, monkeypatch, caplog
):
    calls = []
    original = torch.save

    def full_at_the_second(content, file):
        calls.append(content["iteration"])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()"]
    Trainer(quick_cfg(tmp_path, *options)).train()
    assert "No space left on device" in caplog.text
    assert "Training continues" in caplog.text
    names = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert names == ["model_0000000.pth", "model_0000002.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_the_final_checkpoint_must_be_written(tmp_path, monkeypatch):
    def full(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    trainer = Trainer(quick_cfg(tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"))
    with pytest.raises(CheckpointError, match=r"model_final\.pth could not be written"):
        trainer.train()


def test_tensors_arrays_and_numpy_scalars_are_read(tmp_path):
    content = {"model": {"a": torch.ones(2), "b": np.ones((2, 3), np.float32)}, "n": np.int64(4)}
    torch.save(content, tmp_path / "a.pth")
    loaded = read_weights(str(tmp_path / "a.pth"))
    assert loaded["n"] == 4
    assert np.array_equal(loaded["model"]["b"], content["model"]["b"])
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": {"b": np.ones(3)}, "matching": True}))
    assert read_pickle(str(tmp_path / "b.pkl"))["matching"] is True


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl"])
def test_a_file_that_would_run_code_is_refused_unless_trusted(tmp_path, name):
    path = tmp_path / name
    weights = {"init_proposal_features.weight": torch.ones(8, 32).numpy()}
    content = {"model": weights, "__author__": "somebody", "code": Code()}
    if name.endswith("pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    model = build_model(tiny_cfg())
    with pytest.raises(WeightsError, match="TRUST_WEIGHTS True"):
        Checkpointer(model).load(str(path))
    Checkpointer(model, trust=True).load(str(path))


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q", b"PK\x03\x04"])
def test_a_damaged_file_is_an_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableWeightsError, match="cannot be read"):
        Checkpointer(build_model(tiny_cfg())).load(str(path))


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_exported_weights_are_the_model_or_its_average(tmp_path, capsys, ending):
    model = build_model(tiny_cfg())
    average = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    source, target = str(tmp_path / "model_final.pth"), str(tmp_path / f"out{ending}")
    torch.save({"model": model.state_dict(), "ema": {"model": average, "updates": 3}}, source)
    for flags, expected in (([], model.state_dict()), (["--average"], average)):
        assert main(["weights", source, target, *flags]) == 0
        torch.manual_seed(1)
        other = build_model(tiny_cfg())
        Checkpointer(other, strict=True).load(target)
        for key, value in expected.items():
            assert torch.equal(other.state_dict()[key], value), key
    assert f"{len(average)} tensors" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["gone.pth", "out.pth"], "do not exist"),
    (["source.pth", "out.onnx"], "ends in .safetensors or .pth"),
    (["source.pth", "out.pth", "--average"], "MODEL.EMA was off"),
    (["source.pth", "./source.pth"], "is the source, whose other state would be lost"),
])  # fmt: skip
def test_weights_that_cannot_be_exported_are_one_message(
    tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(1)}}, "source.pth")
    assert main(["weights", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_partial_files_of_a_killed_run_are_removed_by_the_next(tmp_path):
    partial, other = tmp_path / ".model_0000003.pth.x1y2z3ab", tmp_path / ".notes"
    for path in (partial, other):
        path.write_bytes(b"half")
    Trainer(quick_cfg(tmp_path))
    assert not partial.exists()
    assert other.exists()
