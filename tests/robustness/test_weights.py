"""Weight files and checkpoints of every odd kind: one clear error, or loaded and reported."""

import json
import logging
import os
import pickle
import struct
import time

import numpy as np
import pytest
import torch
from conftest import message_of, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.engine.weight_io import export_weights
from dsrcnn.errors import (
    UnreadableWeightsError,
)

NODE = "MODEL.SparseRCNN"
KEY = "head.head_series.0.linear1.weight"
ASAG = ["MODEL.META_ARCHITECTURE", "ASAG", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"]
ASAG += [f"{NODE}.ACTIVATION", "gelu", "MODEL.ASAG.ANCHORS.HIDDEN", 32]
KINDS = {
    "SparseRCNN": [],
    "SQR": [f"{NODE}.SQR.ENABLED", True],
    "DynamicSparseRCNN": [f"{NODE}.DPG.ENABLED", True, f"{NODE}.DPG.HIDDEN", 16],
    "AdaMixer": ["MODEL.META_ARCHITECTURE", "AdaMixer", "MODEL.AdaMixer.OUT_POINTS", 16],
    "ASAG": ASAG,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_cfg())


@pytest.fixture(scope="module")
def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


# Content of a .pth file, made from good weights, and the words of the error.
CONTENTS = {
    "list": (lambda w: [1, 2], "hold a list"),
    "number": (lambda w: 3, "hold a int"),
    "text": (lambda w: "weights", "hold a str"),
    "nothing": (lambda w: None, "hold a NoneType"),
    "tensor": (lambda w: torch.ones(2), "hold a Tensor"),
    "empty": (lambda w: {}, "hold nothing"),
    "model list": (lambda w: {"model": [1]}, "hold a list"),
    "model number": (lambda w: {"model": 1.5}, "hold a float"),
    "model none": (lambda w: {"model": None}, "hold a NoneType"),
    "model empty": (lambda w: {"model": {}}, "hold nothing"),
    "model tensor": (lambda w: {"model": torch.ones(1)}, "hold a Tensor"),
    "text value": (lambda w: {"model": w | {KEY: "a"}}, "hold a str named 'head"),
    "none value": (lambda w: {"model": w | {KEY: None}}, "hold a NoneType named 'head"),
    "list value": (lambda w: {"model": w | {KEY: [1.0]}}, "hold a list named 'head"),
    "nested": (lambda w: {"model": {"model": w}}, "hold a dict named 'model'"),
    "number key": (lambda w: {"model": {3: torch.ones(1)}}, "named 3"),
    "optimizer only": (lambda w: {"optimizer": {"lr": 1}}, "hold a dict named 'optimizer'"),
    "integers": (lambda w: {"model": w | {KEY: w[KEY].int()}}, f"torch.int32 in {KEY}"),
    "bools": (lambda w: {"model": w | {KEY: w[KEY] > 0}}, f"torch.bool in {KEY}"),
    "complex": (lambda w: {"model": w | {KEY: w[KEY] + 0j}}, f"torch.complex64 in {KEY}"),
    "nan": (lambda w: {"model": w | {KEY: w[KEY] * np.nan}}, f"in {KEY} that are not finite"),
    "infinite": (lambda w: {"model": w | {KEY: w[KEY] / 0}}, f"in {KEY} that are not finite"),
    "sparse": (lambda w: {"model": w | {KEY: w[KEY].to_sparse()}}, "sparse, quantized"),
    "infinite in float32": (lambda w: {"model": w | {KEY: w[KEY].double() + 1e300}}, "not finite"),
    "float8": (lambda w: {"model": w | {KEY: (w[KEY] * np.nan).to(torch.float8_e4m3fn)}}, "finite"),
    "nested tensor": (
        lambda w: {"model": w | {KEY: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}},
        "nested, sparse",
    ),
    "meta": (lambda w: {"model": w | {KEY: w[KEY].to("meta")}}, "sparse, quantized or empty"),
    "foreign": (lambda w: {"model": {"a.b": torch.ones(1)}}, "No tensor of"),
    "all of other shapes": (lambda w: {k: torch.ones(1, 7, 3) for k in w}, "No tensor of"),
    "numpy objects": (lambda w: {"model": {KEY: np.array(["a"])}}, "contain more than numbers"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_odd_content_is_one_error(name, strict, model, weights, tmp_path):
    make, words = CONTENTS[name]
    path = str(tmp_path / "odd.pth")
    torch.save(make(weights), path)
    message = message_of(lambda: Checkpointer(model, strict=strict).load(path))
    assert words in message or (strict and "do not fit the model to evaluate" in message)


def _safetensors(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BYTES = {
    "empty.pth": b"",
    "text.pth": b"not a checkpoint",
    "zip.pth": b"PK\x03\x04" + b"\0" * 40,
    "empty.pkl": b"",
    "text.pkl": b"hello",
    "list.pkl": pickle.dumps([1, 2]),
    "text value.pkl": pickle.dumps({"a": "b"}),
    "long double.pkl": pickle.dumps({"a": np.ones(3, np.longdouble)}),
    "cut.pkl": pickle.dumps({"a": np.ones(99)})[:80],
    "empty.pyth": b"",
    "empty.safetensors": b"",
    "short.safetensors": b"\x08\0\0",
    "huge header.safetensors": struct.pack("<Q", 2**60),
    "no json.safetensors": _safetensors(b"{broken"),
    "list.safetensors": _safetensors([1]),
    "unknown type.safetensors": _safetensors({"a": {**ENTRY, "dtype": "X9"}}),
    "beyond the end.safetensors": _safetensors({"a": {**ENTRY, "data_offsets": [0, 999]}}),
    "wrong shape.safetensors": _safetensors({"a": {**ENTRY, "shape": [5]}}),
    "negative.safetensors": _safetensors({"a": {**ENTRY, "shape": [-2]}}),
    "no tensors.safetensors": _safetensors({}, b""),
}


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes_are_one_error_in_every_use(name, model, tmp_path):
    path = tmp_path / name
    path.write_bytes(BYTES[name])
    for strict in (False, True):
        message = message_of(lambda s=strict: Checkpointer(model, strict=s).load(str(path)))
        assert "cannot be read" in message or " hold " in message


def test_a_folder_a_pipe_and_a_missing_file_are_told_apart_and_never_hang(model, tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "broken.pth").symlink_to(tmp_path / "gone")
    start = time.monotonic()
    names = dict.fromkeys(["broken.pth", "gone.pth", "gone.pkl"], "do not exist")
    for name, words in {"": "are a folder", "pipe.pth": "no regular file", **names}.items():
        assert words in message_of(lambda n=name: Checkpointer(model).load(str(tmp_path / n)))
    assert "cannot be fetched" in message_of(
        lambda: Checkpointer(model).load("http://127.0.0.1:9/weights.pth")
    )
    assert "cannot be fetched" in message_of(lambda: Checkpointer(model).load("catalog://x/y"))
    assert time.monotonic() - start < 20


def test_every_flipped_byte_of_the_weights_is_found(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(good), 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        try:
            Checkpointer(model, strict=True).load(str(path))
        except UnreadableWeightsError:
            continue
        # Bytes between the entries of the archive, which nobody reads.
        loaded = model.state_dict()
        path.write_bytes(good)
        Checkpointer(model, strict=True).load(str(path))
        assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "convert"), [
    ("half.pth", lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()}),
    ("double.pth", lambda w: {k: v.double() if v.is_floating_point() else v for k, v in w.items()}),
    ("wrapped.pth", lambda w: {f"module.{k}": v for k, v in w.items()}),
    ("numpy.pth", lambda w: {k: v.numpy() for k, v in w.items()}),
    ("numpy.pkl", lambda w: {"model": {k: v.numpy() for k, v in w.items()}, "__author__": "me"}),
    ("classic.pyth", lambda w: {"model_state": w}),
    ("more.pth", lambda w: {"model": w, "epoch": 3, "args": {"lr": 0.1}, "names": ["a"]}),
])  # fmt: skip
def test_other_forms_of_good_weights_load_completely(name, convert, weights, tmp_path):
    path, content = tmp_path / name, convert(weights)
    if name.endswith("pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    torch.manual_seed(1)
    other = build_model(tiny_cfg())
    Checkpointer(other, strict=True).load(str(path))
    for key, value in weights.items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-3, atol=1e-3)


CHANGES = [
    *((kind, f"{NODE}.NUM_PROPOSALS", n) for kind in KINDS if kind != "ASAG" for n in (5, 19)),
    *((kind, f"{NODE}.NUM_CLASSES", 3) for kind in KINDS),
    *((kind, f"{NODE}.DIM_FEEDFORWARD", 48) for kind in KINDS),
    *((kind, f"{NODE}.NUM_HEADS", count) for kind in ("SparseRCNN", "SQR") for count in (1, 3)),
    ("AdaMixer", f"{NODE}.NUM_HEADS", 3),
    ("AdaMixer", "MODEL.AdaMixer.IN_POINTS", 8),
    ("DynamicSparseRCNN", f"{NODE}.DPG.NUM_EXPERTS", 2),
    ("DynamicSparseRCNN", f"{NODE}.DPG.HIDDEN", 8),
    ("DynamicSparseRCNN", f"{NODE}.DPG.ENABLED", False),
    ("SparseRCNN", f"{NODE}.DPG.ENABLED", True),
    ("SparseRCNN", "MODEL.RESNETS.DEPTH", 34),
    ("ASAG", "MODEL.ASAG.NUM_DECODERS", 2),
    ("ASAG", "MODEL.ASAG.ANCHORS.HIDDEN", 16),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A weight file of every kind of model."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for kind, opts in KINDS.items():
        torch.save({"model": build_model(tiny_cfg(*opts)).state_dict()}, folder / f"{kind}.pth")
    return folder


@pytest.mark.parametrize(("kind", "key", "value"), CHANGES)
def test_weights_of_another_shape_fine_tune_with_a_report_and_are_not_evaluated(
    kind, key, value, saved, caplog
):
    path = str(saved / f"{kind}.pth")
    model = build_model(tiny_cfg(*KINDS[kind], key, value))
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(path)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    cuts_stages = key.endswith("NUM_HEADS") and value < 2
    words = ["start anew", "Cut or tiled", "Not in the file", "cut or tiled"]
    assert cuts_stages or any(word in caplog.text for word in words)
    if not cuts_stages:  # fewer stages are in the file completely
        message = message_of(lambda: Checkpointer(model, strict=True).load(path))
        assert "do not fit the model to evaluate" in message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ASAG"])
def test_proposals_are_cut_or_tiled_to_the_new_number(kind, saved):
    old = torch.load(saved / f"{kind}.pth")["model"]
    for count in (5, 19):
        model = build_model(tiny_cfg(*KINDS[kind], f"{NODE}.NUM_PROPOSALS", count))
        Checkpointer(model).load(str(saved / f"{kind}.pth"))
        for name, value in model.state_dict().items():
            if name.startswith(("init_proposal", "proposal_generator.expert_")):
                dimension, kept = int("expert" in name), min(count, 8)
                first, before = (x.narrow(dimension, 0, kept) for x in (value, old[name]))
                assert torch.equal(first, before)
                if count > 8:  # copies, but not equal ones
                    copy = value.narrow(dimension, 8, 8)
                    assert 0 < (copy - old[name]).abs().max() < 0.1


@pytest.mark.parametrize("average", [5, [], {}, None])
def test_an_odd_average_is_not_exported(average, weights, tmp_path):
    torch.save({"model": weights, "ema": average}, tmp_path / "a.pth")
    target = tmp_path / "b.pth"
    message_of(lambda: export_weights(tmp_path / "a.pth", target, average=True))


def test_complex_tensors_are_not_exported_to_safetensors(tmp_path):
    torch.save({"model": {"a": torch.ones(1, dtype=torch.complex128)}}, tmp_path / "a.pth")
    message_of(lambda: export_weights(tmp_path / "a.pth", tmp_path / "b.safetensors"))
