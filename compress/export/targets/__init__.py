"""One file per engine: how its form of the network is built, and how its kernels are counted.

Each module has ``FILE``, ``build(program, path)``, which returns a ``Census`` where the engine compiles, and whose
keyword-only arguments are what a user may ask of it; and ``requires()``, which says what a machine needs to run the
file; ``PARTS`` names what is written beside it, if anything.
``EXACT = False`` says that it computes in less than float32, ``CHECKED_BY`` which engine is asked in place of its own
when its outputs are checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compress.errors import ExportSkippedError

__all__ = ["IN_INTEGERS", "TARGETS", "WITH_LENGTHS", "Census", "ExportSkippedError"]

TARGETS = {
    "eager": "compress.export.targets.eager",
    "aoti": "compress.export.targets.aoti",
    "aoti_bf16": "compress.export.targets.aoti_bf16",
    "cuda_bf16": "compress.export.targets.cuda_bf16",
    "cuda_fp16": "compress.export.targets.cuda_fp16",
    "aoti_cuda": "compress.export.targets.aoti_cuda",
    "aoti_cuda_bf16": "compress.export.targets.aoti_cuda_bf16",
    "aoti_cuda_fp16": "compress.export.targets.aoti_cuda_fp16",
    "inductor_cuda": "compress.export.targets.inductor_cuda",
    "inductor_cuda_bf16": "compress.export.targets.inductor_cuda_bf16",
    "inductor_cuda_fp16": "compress.export.targets.inductor_cuda_fp16",
    "onnxruntime": "compress.export.targets.onnxruntime",
    "openvino": "compress.export.targets.openvino",
    "executorch": "compress.export.targets.executorch",
    "tvm": "compress.export.targets.tvm",
    "litert": "compress.export.targets.litert",
    "tensorrt": "compress.export.targets.tensorrt",
}

WITH_LENGTHS = frozenset({"eager", "aoti", "onnxruntime", "openvino"})
"""Targets that take sizes beyond the batch that vary."""

IN_INTEGERS = frozenset({"aoti", "onnxruntime", "openvino", "executorch", "litert", "tensorrt"})
"""Targets that may compute products in integers."""

INTEGER_ATTENTION = frozenset({"onnxruntime", "tensorrt"})
"""Targets that are certain to multiply activations by activations in integers. OpenVINO does not say what it does."""


@dataclass(frozen=True)
class Census:
    """The matrix kernels (convolutions and matrix products) of a compiled graph.

    Args:
        int8_kernels: How many take integers.
        float_kernels: How many take floats.
        details: Counts by kernel name.
        conversions: How many nodes of the graph turn floats into integers, where the engine shows them.
        int8_macs: Multiply-accumulates of a sample that are certain to be computed in integers.
        macs: All of them; 0 when only kernels were counted.

    Example:
        >>> Census(9, 1).int8_fraction
        0.9
    """

    int8_kernels: int
    float_kernels: int
    details: dict[str, int] = field(default_factory=dict)
    conversions: int | None = None
    int8_macs: int = 0
    macs: int = 0

    @property
    def int8_fraction(self) -> float:
        """Fraction of int8 among all multiply-accumulates, or kernels where only these were counted; 0 of none."""
        if self.macs:
            return self.int8_macs / self.macs
        return self.int8_kernels / max(1, self.int8_kernels + self.float_kernels)
