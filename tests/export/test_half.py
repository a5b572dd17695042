"""Half precision in ONNX files."""

import numpy as np
import pytest

from dsrcnn.export.half import SCOPES, to_half

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LAYER, NORM = "model.head.linear", "model.backbone.norm"


def node(kind, inputs, output, scope, **attributes):
    made = onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
    made.metadata_props.add(key=SCOPES, value=str(["", scope, kind]))
    return made


@pytest.fixture
def converted(tmp_path):
    """A backbone with a norm, positions that need float32, and a linear layer; before and after."""
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 4, 4])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 4, 4])
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.normal(size=(2, 2, 3, 3)),
        "shared": np.array([0.1]),
        "far": np.array([4097.25]),
        "matrix": random.normal(size=(4, 4)),
    }
    backbone, other = "model.backbone.conv", "model.head"
    nodes = [
        node("Conv", ["x", "kernel"], "a", backbone, pads=[1, 1, 1, 1]),
        node("Add", ["a", "shared"], "b", backbone),
        node("Mul", ["b", "b"], "c", NORM),
        node("Add", ["c", "far"], "d", other),
        node("Sub", ["d", "far"], "e", other),
        node("Add", ["e", "shared"], "f", other),
        node("MatMul", ["f", "matrix"], "g", LAYER),
        node("Add", ["g", "b"], "y", other),
    ]
    for item, names in ((nodes[0], ["model.backbone", backbone]), (nodes[1], ["model.backbone"])):
        item.metadata_props[0].value = str(["", *names, "op"])
    nodes[2].metadata_props[0].value = str(["", "model.backbone", NORM, "op"])
    nodes[6].metadata_props[0].value = str(["", LAYER, "op"])
    tensors = [
        onnx.numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [image], [output], tensors)
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    paths = tmp_path / "full.onnx", tmp_path / "half.onnx"
    for path in paths:
        onnx.save(model, path)
    to_half(paths[1], {LAYER}, {NORM})
    return paths


def test_positions_beside_half_layers_keep_their_digits(converted):
    image = np.random.default_rng(1).normal(size=(1, 2, 4, 4)).astype(np.float32)
    results = []
    for path in converted:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        results += session.run(["y"], {"x": image})
    full, half = results
    difference = np.abs(full - half).max()
    assert 0 < difference < 0.1  # 4097.25 has steps of 4 in float16


def test_only_chosen_operators_and_their_weights_are_float16(converted):
    model = onnx.load(converted[1])
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert kinds == {
        "kernel_half": half, "shared_half": half, "matrix_half": half, "shared": full, "far": full
    }  # fmt: skip
    casts = [n.input[0] for n in model.graph.node if n.op_type == "Cast"]
    assert sorted(casts) == ["b", "f", "g", "x"]  # once each, although b is read twice
    assert not any(n.metadata_props for n in model.graph.node)
