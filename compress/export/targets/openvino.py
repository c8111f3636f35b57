"""OpenVINO's intermediate representation, built from the ONNX graph: it does not take PT2E's own nodes."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from compress.errors import MissingPackageError
from compress.export.graph import LARGEST_NARROW, has_narrow_weights
from compress.export.onnx.translate import translate
from compress.export.samples import are_drawn
from compress.export.targets import Census
from compress.export.targets.openvino_recurrent import quantize_lstms
from compress.measure.machine import has_vnni
from compress.runtime.engines.openvino import NARROW, compile_model

__all__ = ["FILE", "PARTS", "build", "census", "requires"]

FILE = "model.xml"
PARTS = ("model.bin",)

_MATRIX = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "LSTMCell", "GRUCell", "RNNCell", "LSTMSequence"}
_MATRIX |= {"RNNSeq", "GRUSequence", "GroupConvolution", "MHA", "ScaledDotProductAttention", "Interaction"}
_INTEGERS = {"i8", "u8", "i4", "u4"}


def build(program: ExportedProgram, path: Path) -> Census:
    """Translate the program by way of ONNX and count the kernels that OpenVINO makes of it here.

    Raises:
        ExportSkippedError: when the program is larger than one ONNX file can be, or has an operator that ONNX lacks.
        MissingPackageError: when onnx, onnxscript or openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(translate(program, target="openvino").SerializeToString())
        openvino.save_model(openvino.convert_model(str(file)), str(file.with_suffix(".xml")), compress_to_fp16=False)
        model = openvino.Core().read_model(str(file.with_suffix(".xml")))
    is_narrow = has_narrow_weights(program)
    if is_narrow or has_vnni():  # else it computes LSTMs in floats
        examples = [value.detach().cpu().numpy() for value in program.example_inputs[0]]
        known = None if are_drawn(program) else examples
        quantize_lstms(model, known, largest=LARGEST_NARROW if is_narrow else 127)
    if is_narrow:
        model.set_rt_info("1", NARROW)
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return census(path)


def census(path: Path) -> Census:
    """Count the kernels of the graph as OpenVINO compiles it, by the precision that it says it runs them in.

    On a processor without VNNI these are the kernels of processors with it: there the engine computes in floats, unless
    all weights are narrow.
    """
    int8, floats, others = Counter[str](), Counter[str](), Counter[str]()
    for node in compile_model(path, None, integers=True).get_runtime_model().get_ordered_ops():
        information = node.get_rt_info()
        kind, precision = (str(information[key].astype(str)) for key in ("layerType", "runtimePrecision"))
        if kind in _MATRIX:
            (int8 if precision in _INTEGERS else floats)[f"{kind} {precision}"] += 1
        elif kind == "FakeQuantize":
            others[kind] += 1
    return Census(int8.total(), floats.total(), {**int8, **floats, **others}, others.total())


def requires() -> dict[str, Any]:
    """Return what a machine needs: nothing but OpenVINO, which compiles on loading."""
    return {}
