"""Export formats: how to write a file in each, and how to run it in its own runtime."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scala_cli.errors import ScalaError, naming_failure
from scala_cli.timing import Predictor

LOGITS = ("logits",)
"""The name of a model's output in its file, by default."""
OPSETS = range(17, 26)
"""ONNX opsets that a ViT can be written in; from 17 on LayerNormalization is one operator."""
LARGEST_EXECUTORCH = 64
"""Largest batch of ExecuTorch, which plans its memory ahead; the other formats take any batch."""


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        suffix: the suffix of its files.
        modules: packages needed besides torch; the extra of the format's name installs them.
        write: function of model, example input (B, C, H, W), file, names of classes and `outputs`; for ONNX
            also `opset`.
        open: file -> function from images to logits, in float32, with as many threads as torch uses; the
            function returns a tuple if the model has several outputs.
        open_bfloat16: like `open`, in bfloat16; None if the runtime cannot.
    """

    suffix: str
    modules: Sequence[str]
    write: Callable[..., None]
    open: Callable[[Path], Predictor]
    open_bfloat16: Callable[[Path], Predictor] | None = None


def format_named(name: str) -> Format:
    """Returns the format of a name. Raises ScalaError if it is unknown, or if its packages are missing."""
    if name not in FORMATS:
        raise ScalaError(f"there is no format {name!r}.", f"Formats are {', '.join(FORMATS)}.")
    missing = [module for module in FORMATS[name].modules if find_spec(module) is None]
    if missing:
        extra = name.partition("-")[0]
        raise ScalaError(
            f"{name} needs {missing[0]}, which is not installed.", f"pip install 'scala-vit[{extra}]'"
        )
    return FORMATS[name]


def refuse_opset(opset: int | None) -> None:
    """Raises ScalaError for an ONNX opset that no ViT can be written in."""
    if opset is not None and opset not in OPSETS:
        raise ScalaError(
            f"a ViT cannot be written in opset {opset}.", f"Give one from {OPSETS[0]} to {OPSETS[-1]}."
        )


def write(
    kind: str,
    model: nn.Module,
    example: Tensor,
    file: Path,
    labels: Sequence[str] = (),
    opset: int | None = None,
    outputs: Sequence[str] = LOGITS,
) -> None:
    """Writes a model in the format of that name.

    Args:
        outputs: the names of the model's outputs, for formats that store names.
        opset: ONNX opset, only for ONNX formats; None for the exporter's default.

    Raises ScalaError if the format, or that opset, cannot express the model.
    """
    options: dict[str, Any] = {"outputs": outputs} | ({} if opset is None else {"opset": opset})
    with naming_failure(f"{kind} cannot express this {type(model).__name__}", OTHERWISE):
        FORMATS[kind].write(model, example, file, labels, **options)


def opened(kind: str, file: Path) -> Predictor:
    """Opens a file in its runtime. Raises ScalaError if the runtime refuses it."""
    with naming_failure(f"{kind}'s runtime does not open what was written", OTHERWISE):
        return FORMATS[kind].open(file)


@contextmanager
def quietly() -> Iterator[None]:
    """Silences what exporters warn of: their own deprecations, and passes that did not apply."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def traced(model: nn.Module, example: Tensor, largest_batch: int | None = None) -> Any:
    """Returns torch.export's program, for batches of any size up to `largest_batch`."""
    batch = torch.export.Dim("batch", min=1, max=largest_batch or 2**31)
    with quietly():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def to_onnx(
    model: nn.Module,
    example: Tensor,
    labels: Sequence[str],
    opset: int | None = None,
    optimize: bool = True,
    outputs: Sequence[str] = LOGITS,
) -> Any:
    """Returns the onnx_ir model, without the exporter's notes, which name paths on this machine.

    Raises ScalaError if it cannot be written in that opset.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with quietly():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=[*outputs],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
            optimize=optimize,
            opset_version=opset and max(opset, 18),  # torch writes 18 and later itself
        )
    assert program is not None
    graph: Any = program.model
    if opset == 17:
        to_opset_17(graph)
    if opset and opset_of(graph) != opset:
        raise ScalaError(
            f"this model cannot be written in opset {opset}.", f"It can in opset {opset_of(graph)}."
        )
    ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props["labels"] = json.dumps(list(labels))
    graph.metadata_props["opset"] = str(opset_of(graph))
    return graph


def opset_of(graph: Any) -> int:
    """Returns the opset of ONNX's own operators in an onnx_ir model."""
    return graph.opset_imports[""]


def opset_in(file: Path) -> int:
    """Returns the opset of ONNX's own operators in an ONNX file."""
    import onnx

    imports = onnx.load(file, load_external_data=False).opset_import
    return next(each.version for each in imports if not each.domain)


def to_opset_17(graph: Any) -> None:
    """Rewrites a graph from opset 18 to 17, in place: the axes of reductions turn from inputs to attributes.

    onnx's own converter can do so only if all weights fit in one message of 2 GB.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in graph.graph:
        if node.op_type in ("ReduceMean", "ReduceMax") and len(node.inputs) == 2:
            axes, made = node.inputs[1], node.inputs[1].producer()
            if made is not None and made.op_type == "Reshape":  # from a number to a list of one
                axes = made.inputs[0]
            constant: Any = onnx_ir.convenience.get_const_tensor(axes)
            numbers = constant.numpy().flatten().tolist()
            node.resize_inputs(1)
            node.attributes.add(onnx_ir.AttrInt64s("axes", numbers))
            node.attributes.pop("noop_with_empty_axes", None)
        if node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
    graph.opset_imports[""] = 17
    RemoveUnusedNodesPass()(graph)


def only_output(outputs: Sequence[Any]) -> Any:
    """Returns copies of a runtime's outputs, as a tuple of tensors; a single one by itself."""
    tensors = tuple(torch.as_tensor(output).clone() for output in outputs)
    return tensors if len(tensors) > 1 else tensors[0]


def write_onnx(
    model: nn.Module,
    example: Tensor,
    file: Path,
    labels: Sequence[str],
    opset: int | None = None,
    outputs: Sequence[str] = LOGITS,
) -> None:
    """Writes a model as ONNX with a dynamic batch dimension."""

    import onnx_ir

    onnx_ir.save(to_onnx(model, example, labels, opset, outputs=outputs), file)


def write_onnx_int8(
    model: nn.Module,
    example: Tensor,
    file: Path,
    labels: Sequence[str],
    opset: int | None = None,
    outputs: Sequence[str] = LOGITS,
) -> None:
    """Writes ONNX with 8-bit weights in all matrix products; activations are quantised at run time."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx_ir.to_proto(to_onnx(model, example, labels, opset, outputs=outputs))
    del graph.graph.value_info[:]  # the quantiser would find these shapes in conflict with its own
    with quietly():
        quantize_dynamic(graph, file, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def open_onnx(file: Path) -> Predictor:
    """Returns the model of an ONNX file, run by ONNX Runtime on the CPU."""

    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # spinning threads would slow whatever runs next (docs/performance.md)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: only_output(session.run(None, {"images": images.numpy()}))


def write_pt2(
    model: nn.Module, example: Tensor, file: Path, labels: Sequence[str], outputs: Sequence[str] = LOGITS
) -> None:
    """Writes a model as a torch.export archive."""
    whole = BytesIO()  # torch's own writer does not tell a full disk from other failures
    torch.export.save(traced(model, example), whole, extra_files={"labels.json": json.dumps(list(labels))})
    file.write_bytes(whole.getbuffer())


def open_pt2(file: Path) -> Predictor:
    """Returns the model of a torch.export archive."""
    return torch.export.load(file).module()


def write_openvino(
    model: nn.Module, example: Tensor, file: Path, labels: Sequence[str], outputs: Sequence[str] = LOGITS
) -> None:
    """Writes OpenVINO's two files: the graph, and beside it the weights as .bin."""
    import openvino

    graph = openvino.convert_model(traced(model, example), example_input=example)
    graph.inputs[0].tensor.set_names({"images"})
    for output, name in zip(graph.outputs, outputs, strict=True):
        output.tensor.set_names({name})
    graph.set_rt_info(json.dumps(list(labels)), "labels")
    openvino.save_model(graph, file, compress_to_fp16=False)


def open_openvino(file: Path, precision: str = "f32") -> Predictor:
    """Returns the model of an OpenVINO file, run on the CPU."""

    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: only_output([*compiled(images.numpy()).values()])


def write_executorch(
    model: nn.Module, example: Tensor, file: Path, labels: Sequence[str], outputs: Sequence[str] = LOGITS
) -> None:
    """Writes ExecuTorch's program for XNNPACK; its method `labels` returns the class names as JSON."""
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            traced(model, example, LARGEST_EXECUTORCH),
            partitioner=[XnnpackPartitioner()],
            constant_methods={"labels": json.dumps(list(labels))},
        )
        file.write_bytes(lowered.to_executorch().buffer)


def open_executorch(file: Path) -> Predictor:
    """Returns the model of an ExecuTorch file."""

    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda images: only_output(method.execute([images]))


ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ONNX, write_onnx, open_onnx),
    "onnx-int8": Format(".onnx", ONNX, write_onnx_int8, open_onnx),
    "pt2": Format(".pt2", (), write_pt2, open_pt2),
    "openvino": Format(
        ".xml", ("openvino",), write_openvino, open_openvino, partial(open_openvino, precision="bf16")
    ),
    "executorch": Format(".pte", ("executorch",), write_executorch, open_executorch),
}
OTHERWISE = f"Choose another format: {', '.join(FORMATS)}"


def is_onnx(kind: str) -> bool:
    """Returns whether a format is ONNX, which has opsets."""
    return kind.startswith("onnx")


def is_int8(kind: str) -> bool:
    """Returns whether a format rounds the weights, so that its outputs are only near torch's."""
    return kind.endswith("int8")
