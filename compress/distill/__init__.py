"""Teaching a student: losses as functions and modules, teachers, tasks, schedules, and the Distiller."""

from compress.distill.cache import OutputCache
from compress.distill.distiller import Distiller, check_weights
from compress.distill.features import FeatureTaps, find_layers
from compress.distill.functional import soft_target
from compress.distill.lesson import Batch, Lesson, View, read_batch
from compress.distill.losses import *  # noqa: F403  the names that it lists
from compress.distill.losses import __all__ as _LOSSES
from compress.distill.mutual import MutualDistiller
from compress.distill.schedulers import LearningRateSchedule, WarmupCosine
from compress.distill.tasks import Classification, MultiLabel, MultiTask, Regression, Task
from compress.distill.teachers import (
    ArtifactTeacher,
    EarlierSelf,
    Ensemble,
    FileTeacher,
    LiveTeacher,
    MovingAverage,
    OnnxTeacher,
    OwnTeacher,
    ProgramTeacher,
    confidence_weights,
    freeze,
)
from compress.distill.weights import Decay, Warmup, WeightSchedule, Window
from compress.models import Constructed

__all__ = [
    *_LOSSES,
    "ArtifactTeacher",
    "Batch",
    "Classification",
    "Constructed",
    "Decay",
    "Distiller",
    "EarlierSelf",
    "Ensemble",
    "FeatureTaps",
    "FileTeacher",
    "LearningRateSchedule",
    "Lesson",
    "LiveTeacher",
    "MovingAverage",
    "MultiLabel",
    "MultiTask",
    "MutualDistiller",
    "OnnxTeacher",
    "OutputCache",
    "OwnTeacher",
    "ProgramTeacher",
    "Regression",
    "Task",
    "View",
    "Warmup",
    "WarmupCosine",
    "WeightSchedule",
    "Window",
    "check_weights",
    "confidence_weights",
    "find_layers",
    "freeze",
    "read_batch",
    "soft_target",
]
