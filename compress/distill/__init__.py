"""Teaching a student: losses as functions and modules, tasks, learning-rate schedules, and the Distiller."""

from compress.distill.distiller import Distiller
from compress.distill.functional import soft_target
from compress.distill.losses import DistillationLoss, SoftTarget
from compress.distill.schedulers import LearningRateSchedule, WarmupCosine
from compress.distill.tasks import Classification, Task
from compress.distill.teacher import freeze

__all__ = [
    "Classification",
    "DistillationLoss",
    "Distiller",
    "LearningRateSchedule",
    "SoftTarget",
    "Task",
    "WarmupCosine",
    "freeze",
    "soft_target",
]
