"""Half precision in ONNX files.

Converters of whole models also round what passes between two operators of float32. Rows of the
feature table and pixels need more than the 11 bits of float16, so here only chosen operators, their
weights and the tensors between them change, with casts at the borders.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the names of the modules that it is in
# Operators whose float inputs all have the type of the output; of Resize the first one.
_HALF_OPERATORS = {
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSigmoid"),
    *("HardSwish", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize"),
}


def to_half(path: Path, layers: set[str], norms: set[str]) -> None:
    """Convert the backbone and `layers` of an ONNX file to float16, in place.

    Args:
        path: of the file, with the scopes of its nodes, which are removed.
        layers: names of linear layers outside of the backbone.
        norms: names of norms, which stay in float32: their sums of squares exceed float16.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = _element_types(model)

    def is_half(node: Any) -> bool:
        names = _scopes(node)
        in_place = "model.backbone" in names or (len(names) > 1 and names[-2] in layers)
        is_float = types.get(node.output[0]) == onnx.TensorProto.FLOAT
        return in_place and is_float and norms.isdisjoint(names) and node.op_type in _HALF_OPERATORS

    _convert(model.graph, is_half, types)
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _scopes(node: Any) -> list[str]:
    text = {p.key: p.value for p in node.metadata_props}.get(SCOPES, "")
    names: list[str] = ast.literal_eval(text) if text else []
    return names


def _element_types(model: Any) -> dict[str, int]:
    """Element types of tensors by name."""
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _convert(graph: Any, is_half: Callable[[Any], bool], types: dict[str, int]) -> None:
    """Convert nodes, and cast every tensor once where a node of another type reads it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    half: set[str] = set()  # tensors that are float16
    casts: dict[str, str] = {}  # name of a tensor in the other type
    nodes = []

    def other(name: str, kind: int) -> str:
        if name not in casts:
            casts[name] = f"{name}_{'half' if kind == TensorProto.FLOAT16 else 'float'}"
            if name in weights:
                values = numpy_helper.to_array(weights[name]).astype("float16")
                graph.initializer.append(numpy_helper.from_array(values, casts[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [casts[name]], to=kind))
        return casts[name]

    for node in graph.node:
        converts = is_half(node)
        for index, name in enumerate(node.input):
            if types.get(name) != TensorProto.FLOAT or (node.op_type == "Resize" and index):
                continue
            if converts and name not in half:
                node.input[index] = other(name, TensorProto.FLOAT16)
            elif not converts and name in half:
                node.input[index] = other(name, TensorProto.FLOAT)
        nodes.append(node)
        if converts:
            half.update(node.output)
    for name in outputs & half:
        raise AssertionError(f"{name} is an output, and those are float32")
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    # Copies: what is deleted from a graph is emptied.
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(kept)
