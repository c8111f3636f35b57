"""Where a teacher's answers come from in a fit: a live network, stored outputs, or the student's own earlier self."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.cache import OutputCache
from compress.distill.features import FeatureTaps, find_layers
from compress.distill.lesson import Batch, View
from compress.distill.stored import from_stored
from compress.distill.teachers import Ensemble, LiveTeacher, OwnTeacher, check_finite, not_finite
from compress.errors import DataError, RecipeError
from compress.surgery import Edit

__all__ = ["CachedSource", "LiveSource", "OwnSource", "TeacherSource", "make_source"]

_WHERE = "distill.losses.layers (teacher)"


class TeacherSource(ABC):
    """Gives what the teachers say to each batch.

    Attributes:
        network: The teacher, where there is one.
    """

    network: nn.Module | None = None

    def begin(self, student: nn.Module) -> None:
        """Meet the student, before the fit."""

    @abstractmethod
    def find(self, pattern: str) -> Sequence[str]:
        """Return the teacher's layers that match a pattern.

        Raises:
            RecipeError: when there are none.
        """

    @abstractmethod
    def tap(self, names: Sequence[str]) -> None:
        """Say which activations are wanted."""

    @abstractmethod
    def teach(self, batch: Batch) -> tuple[Sequence[View], Tensor | None]:
        """Return what each teacher says, and when there are several, the weight of each for each sample, (K, N).

        Raises:
            DataError: when an answer is not finite.
        """

    def rehearse(self, batch: Batch) -> Sequence[View]:
        """Return what is said to a batch before the fit, from which losses see the shapes of activations."""
        return self.teach(batch)[0]

    def to(self, device: torch.device) -> None:
        """Move to a device."""

    def follow(self, student: nn.Module) -> None:
        """Take note of a student that has made a step."""

    def edit(self, student: nn.Module, edit: Edit, apply: Callable[[nn.Module, Edit], nn.Module]) -> None:
        """Take note of an edit that the student is about to get."""

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint must hold, if anything."""
        return None

    def restore(self, student: nn.Module, state: dict[str, Any]) -> None:
        """Restore what ``state`` gave."""


class LiveSource(TeacherSource):
    """A network that runs on every batch; an ``Ensemble`` gives one answer for each member.

    Args:
        teacher: The frozen network and how to run it.
    """

    def __init__(self, teacher: LiveTeacher) -> None:
        self.teacher = teacher
        self.network = teacher.network
        self._taps = FeatureTaps()
        self._wrong: Tensor | None = None

    def find(self, pattern: str) -> Sequence[str]:
        """Return the teacher's layers that match a pattern."""
        return find_layers(self.teacher.network, pattern, where=_WHERE)

    def tap(self, names: Sequence[str]) -> None:
        """Say which activations are wanted."""
        self._taps = FeatureTaps(names)

    def teach(self, batch: Batch) -> tuple[Sequence[View], Tensor | None]:
        """Return what each member says."""
        view = self._taps.through(self.teacher, self.teacher.network, *batch.inputs, **batch.named)
        self._check(view.outputs)
        network = self.teacher.network
        if not isinstance(network, Ensemble):
            return [view], None
        views = [View(outputs, view.features) for outputs in view.outputs]
        return views, network.sample_weights(view.outputs, batch.targets)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.teacher.to(device)

    def _check(self, outputs: Any) -> None:
        # Asking a GPU waits for it: there, the answer for the batch before, which is known by now, is looked at.
        wrong = not_finite(outputs)
        late, self._wrong = self._wrong, wrong
        if wrong.device.type == "cpu" or (late is not None and bool(late)):
            check_finite(outputs)


class CachedSource(TeacherSource):
    """Outputs that were stored by ``store_outputs``; batches must carry keys.

    Args:
        cache: The stored outputs.
    """

    def __init__(self, cache: OutputCache) -> None:
        self.cache = cache
        self._wanted: Sequence[str] = ()

    def find(self, pattern: str) -> Sequence[str]:
        """Return the stored activations that match a pattern."""
        stored = [name.removeprefix("features/") for name in self.cache.fields if name.startswith("features/")]
        tree = nn.Module()
        for name in stored:
            _add(tree, name.partition(":")[0].split("."))
        return find_layers(tree, pattern, where=f"{_WHERE} among those in the cache")

    def tap(self, names: Sequence[str]) -> None:
        """Say which activations are wanted."""
        self._wanted = names

    def teach(self, batch: Batch) -> tuple[Sequence[View], Tensor | None]:
        """Return what was stored for the samples of a batch.

        Raises:
            DataError: when the batch carries no keys.
        """
        if batch.keys is None:
            raise DataError(
                "batch: expected keys of the samples for a cached teacher, got none. "
                "Wrap the loader in compress.data.keyed_loader."
            )
        device = batch.keys.device
        keys = batch.keys.cpu()
        stored = self.cache.read(keys[:, 0], keys[:, 1])
        return from_stored({name: tensor.to(device) for name, tensor in stored.items()})


class OwnSource(TeacherSource):
    """The student's own moving average or earlier self, made in the fit.

    Args:
        teacher: How it is made.
    """

    def __init__(self, teacher: OwnTeacher) -> None:
        self.teacher = teacher
        self._taps = FeatureTaps()
        self._student: nn.Module | None = None

    @property
    def network(self) -> nn.Module | None:  # type: ignore[override]
        """The teacher, once there is one."""
        return self.teacher.network

    def begin(self, student: nn.Module) -> None:
        """Meet the student."""
        self._student = student
        self.teacher.begin(student)

    def find(self, pattern: str) -> Sequence[str]:
        """Return the student's layers that match a pattern; the teacher has the same."""
        if self._student is None:
            raise RecipeError("teacher: expected a student to follow, got none. Fit the Distiller first.")
        return find_layers(self._student, pattern, where=_WHERE)

    def tap(self, names: Sequence[str]) -> None:
        """Say which activations are wanted."""
        self._taps = FeatureTaps(names)

    def teach(self, batch: Batch) -> tuple[Sequence[View], Tensor | None]:
        """Return what the teacher says, nothing before there is one."""
        network = self.teacher.network
        if network is None:
            return (), None
        with torch.no_grad():
            view = self._taps(network.eval(), *batch.inputs, **batch.named)
        return [view], None

    def rehearse(self, batch: Batch) -> Sequence[View]:
        """Return what the student says where the teacher, a copy of it to come, is not there yet."""
        network = self.teacher.network or self._student
        assert network is not None  # it has met the student
        return [self._taps(network, *batch.inputs, **batch.named)]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        if self.teacher.network is not None:
            self.teacher.network.to(device)

    def follow(self, student: nn.Module) -> None:
        """Take note of a step."""
        self.teacher.follow(student)

    def edit(self, student: nn.Module, edit: Edit, apply: Callable[[nn.Module, Edit], nn.Module]) -> None:
        """Take note of an edit."""
        self.teacher.edit(student, edit, apply)

    def state(self) -> dict[str, Any] | None:
        """Return the teacher's weights, once there is one."""
        return self.teacher.network.state_dict() if self.teacher.network is not None else None

    def restore(self, student: nn.Module, state: dict[str, Any]) -> None:
        """Restore the teacher's weights."""
        assert self.teacher.network is not None  # edits have been replayed
        self.teacher.network.load_state_dict(state)


def make_source(teacher: Any) -> TeacherSource:
    """Return the source for whatever serves as a teacher.

    Raises:
        RecipeError: when it is nothing that teaches.
    """
    if isinstance(teacher, OutputCache):
        return CachedSource(teacher)
    if isinstance(teacher, OwnTeacher):
        return OwnSource(teacher)
    if isinstance(teacher, LiveTeacher):
        return LiveSource(teacher)
    if isinstance(teacher, nn.Module):
        return LiveSource(LiveTeacher(teacher))
    raise RecipeError(
        f"teacher: expected a network, a LiveTeacher or an OutputCache, got {type(teacher).__name__}. Wrap it in one."
    )


def _add(tree: nn.Module, path: Sequence[str]) -> None:
    for part in path:
        if part not in dict(tree.named_children()):
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
