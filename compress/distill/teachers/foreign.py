"""Teachers from files: an exported program, an ONNX file of any framework, an artefact of this package.

Files are opened at the first call, not when a recipe is read; copies and other processes open them again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import RecipeError
from compress.runtime import load
from compress.runtime.engines import make_engine

__all__ = ["ArtifactTeacher", "FileTeacher", "OnnxTeacher", "ProgramTeacher"]

Call = Callable[..., Any]

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.movedim(1, -1),
    "flat": lambda x: x.flatten(1),
}


class FileTeacher(nn.Module):
    """Base of networks that are files; they have no layers that losses could name.

    Args:
        path: The file.
        gives: ``"logits"``, or ``"probabilities"``, of which the logarithm is taken.

    Attributes:
        engine: What runs the file, as reports name it.

    Raises:
        RecipeError: when there is no such file.
    """

    engine = "eager"

    def __init__(self, path: str, gives: str = "logits") -> None:
        super().__init__()
        if not Path(path).exists():
            raise RecipeError(f"teacher.model.path: expected a file, got none at {path}. Check the path.")
        if gives not in ("logits", "probabilities"):
            raise RecipeError(f"teacher.model.gives: expected logits or probabilities, got {gives!r}. Choose one.")
        self.path = str(path)
        self.gives = gives
        self._opened: tuple[Call, ...] = ()

    @abstractmethod
    def open(self) -> Call:
        """Return what takes tensors on any device and gives the output."""

    def forward(self, *inputs: Tensor) -> Any:
        """Return logits, (N, C), or whatever the file gives."""
        if not self._opened:
            self._opened = (self.open(),)
        outputs = self._opened[0](*inputs)
        return outputs.float().clamp(min=1e-7).log() if self.gives == "probabilities" else outputs

    def extra_repr(self) -> str:
        """Return the path and what makes this teacher differ from others of the same file."""
        return f"{self.path!r}, gives={self.gives!r}"

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        path = Path(self.path)
        return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": ()}


class ProgramTeacher(FileTeacher):
    """A ``.pt2`` file of ``torch.export.save``. Loading unpickles: only from a trusted source.

    Args:
        path: The file.
        gives: ``"logits"`` or ``"probabilities"``.

    Raises:
        RecipeError: when there is no such file, or the program was exported in training mode.
    """

    def __init__(self, path: str, gives: str = "logits") -> None:
        super().__init__(path, gives)

    def open(self) -> Call:
        """Load the program."""
        try:
            program = torch.export.load(self.path).module(check_guards=False)
        except Exception as error:  # a zip, pickle or schema error
            raise RecipeError(
                f"teacher.model.path: expected a program of torch.export.save, got {type(error).__name__} from "
                f"{self.path}. Export the teacher again with this version of torch."
            ) from error
        if _in_training_mode(program):
            raise RecipeError(
                f"teacher.model.path: expected a program exported in eval mode, got {self.path} with dropout or "
                "BatchNorm in training mode. Call .eval() before torch.export.export."
            )
        devices: list[torch.device] = []

        def call(*inputs: Tensor) -> Any:
            if devices != [inputs[0].device]:
                program.to(inputs[0].device)
                devices[:] = [inputs[0].device]
            return program(*inputs)

        return call


class OnnxTeacher(FileTeacher):
    """An ONNX file through ONNX Runtime on the CPU: TensorFlow, Keras, Paddle, JAX or scikit-learn may have made it.

    Args:
        path: The file.
        output: Name of the output to learn from; by default the first of floating type.
        layout: How the file wants inputs (N, C, H, W): ``"NCHW"``, ``"NHWC"`` or ``"flat"``, (N, CHW).
        gives: ``"logits"`` or ``"probabilities"``.
        scale: The file's inputs are ``x * scale + offset``, where its training scaled images otherwise than ``data``.
        offset: See ``scale``; one value, or one a channel.
        num_threads: Threads; all cores by default.

    Raises:
        RecipeError: when there is no such file, or an argument is unknown.
    """

    engine = "onnxruntime"

    def __init__(
        self,
        path: str,
        output: str | None = None,
        layout: str = "NCHW",
        gives: str = "logits",
        scale: float | list[float] = 1.0,
        offset: float | list[float] = 0.0,
        num_threads: int | None = None,
    ) -> None:
        super().__init__(path, gives)
        if layout not in _LAYOUTS:
            raise RecipeError(f"teacher.model.layout: expected {', '.join(_LAYOUTS)}, got {layout!r}. Choose one.")
        self.output = output
        self.layout = layout
        self.scale = scale
        self.offset = offset
        self.num_threads = num_threads

    def open(self) -> Call:
        """Open a session."""
        try:
            engine: Any = make_engine("onnxruntime", Path(self.path), num_threads=self.num_threads)
        except Exception as error:  # whatever the library says to a file that it cannot read
            raise RecipeError(
                f"teacher.model.path: expected an ONNX file, got {type(error).__name__} from {self.path}: "
                f"{' '.join(str(error).split())[:200]}. Export the teacher again."
            ) from error
        position = self._position(engine.outputs)
        spec = engine.inputs[0]
        dtype = getattr(torch, spec.dtype)

        def call(*inputs: Tensor) -> Tensor:
            first = inputs[0]
            given = [self._arrange(first).to(dtype), *inputs[1:]]
            arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in given]
            size = spec.shape[0] or len(first)  # some files know one batch size only
            parts = [
                torch.from_numpy(engine([array[row : row + size] for array in arrays])[position])
                for row in range(0, len(first), size)
            ]
            return torch.cat(parts).to(first.device)

        return call

    def extra_repr(self) -> str:
        """Return all that changes the answers."""
        named = {name: getattr(self, name) for name in ("output", "layout", "scale", "offset")}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in named.items())])

    def _arrange(self, x: Tensor) -> Tensor:
        if (self.scale, self.offset) != (1.0, 0.0):
            wide = (-1, *[1] * (x.dim() - 2))
            scale, offset = (torch.tensor(value, device=x.device) for value in (self.scale, self.offset))
            x = x * scale.view(wide if scale.dim() else ()) + offset.view(wide if offset.dim() else ())
        return _LAYOUTS[self.layout](x)

    def _position(self, outputs: Any) -> int:
        names = [spec.name for spec in outputs]
        if self.output is not None and self.output not in names:
            raise RecipeError(
                f"teacher.model.output: expected one of {', '.join(names)}, got {self.output!r}. "
                f"Name an output of {self.path}."
            )
        floats = [spec.name for spec in outputs if "float" in spec.dtype]
        if self.output is None and not floats:
            raise RecipeError(
                f"teacher.model.path: expected an output of floating type, got {', '.join(names)} in {self.path}. "
                "Export the teacher with its logits or probabilities as a tensor."
            )
        return names.index(self.output or floats[0])


class ArtifactTeacher(FileTeacher):
    """An artefact that ``compress export`` made, with the engine that is the fastest here.

    Args:
        path: Its directory.
        engine: Name of an engine, or ``"auto"``.
        gives: ``"logits"`` or ``"probabilities"``.
        trust: Whether an artefact that was built elsewhere may run its code.

    Raises:
        RecipeError: when there is no such directory.
    """

    def __init__(self, path: str, engine: str = "auto", gives: str = "logits", trust: bool = False) -> None:
        super().__init__(path, gives)
        self.engine = engine
        self.trust = trust

    def open(self) -> Call:
        """Load the artefact."""
        return load(self.path, engine=self.engine, trust=self.trust)

    def extra_repr(self) -> str:
        """Return the path and the engine."""
        return f"{super().extra_repr()}, engine={self.engine!r}"


def _in_training_mode(program: Any) -> bool:
    """Say whether a node draws random numbers or updates BatchNorm statistics."""
    aten = torch.ops.aten
    positions = {aten.dropout.default: 2, aten.batch_norm.default: 5}
    for node in program.graph.nodes:
        position = positions.get(node.target)
        if position is not None and len(node.args) > position and node.args[position] is True:
            return True
        if node.target in (aten._native_batch_norm_legit_functional.default, aten.native_dropout.default):
            return True
    return False
