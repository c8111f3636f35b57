"""Teachers: networks that run on every batch, files of any framework, several as one, and the student's own selves."""

from compress.distill.teachers.ensemble import Ensemble, confidence_weights
from compress.distill.teachers.foreign import ArtifactTeacher, FileTeacher, OnnxTeacher, ProgramTeacher
from compress.distill.teachers.live import LiveTeacher, check_finite, freeze, not_finite
from compress.distill.teachers.own import EarlierSelf, MovingAverage, OwnTeacher

__all__ = [
    "ArtifactTeacher",
    "EarlierSelf",
    "Ensemble",
    "FileTeacher",
    "LiveTeacher",
    "MovingAverage",
    "OnnxTeacher",
    "OwnTeacher",
    "ProgramTeacher",
    "check_finite",
    "confidence_weights",
    "freeze",
    "not_finite",
]
