"""MetaSchedule for TVM: schedules of a batch of one are drawn and measured here, and the fastest kept."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from compress.errors import ExportSkippedError, MissingPackageError

__all__ = ["with_tuned_single"]

_OTHER_PROCESSORS = ("cuda", "rocm", "metal", "hexagon", "riscv_cpu")
_PER_ROUND = 16
_CRASHES = (0, 1, 15)  # of apache-tvm-ffi, with apache-tvm 0.27


def with_tuned_single(module: Any, single: Any, target: Any, trials: int, name: str) -> Any:
    """Add a function that was tuned to a module, lowered, beside those it has.

    Args:
        module: In Relax, of any batch.
        single: The same network with a batch of one, as ``main``.
        target: TVM's, with the number of cores.
        trials: Schedules that are measured, of all operators together.
        name: Of the function.

    Raises:
        MissingPackageError: when psutil or cloudpickle, which the search needs, is not installed.
        ExportSkippedError: when TVM's library is one that ends this process in the search.
    """
    for package in ("psutil", "cloudpickle"):
        if find_spec(package) is None:
            raise MissingPackageError(package, "tvm")
    installed = version("apache-tvm-ffi")
    if tuple(map(int, installed.split(".")[:3])) >= _CRASHES:
        raise ExportSkippedError(
            f"tvm: expected apache-tvm-ffi below 0.1.15 to tune, since searches crash from there on, got {installed}. "
            "Install an earlier one, or leave trials out."
        )
    _leave_out_intrinsics()
    from tvm import relax, transform
    from tvm.s_tir.meta_schedule.relax_integration import tune_relax

    lower = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.pipeline.zero_pipeline(),
    ]
    with tempfile.TemporaryDirectory() as folder, target:
        tune_relax(
            transform.Sequential(lower)(single),
            {},
            target,
            folder,
            trials,
            num_trials_per_iter=_PER_ROUND,
            strategy="replay-trace",
            cost_model="random",  # the learned one needs xgboost, and more trials than a build has time for
            seed=0,
        )
        module[name] = single["main"].with_attr("global_symbol", name)
        return transform.Sequential([*lower, relax.transform.MetaScheduleApplyDatabase(folder)])(module)


def _leave_out_intrinsics() -> None:
    """Spare the instructions of other processors, whose definitions take TVM half a minute to read."""
    for name in _OTHER_PROCESSORS:
        module = f"tvm.s_tir.tensor_intrin.{name}"
        sys.modules.setdefault(module, ModuleType(module))
