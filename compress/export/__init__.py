"""From a trained network to an artefact that has been checked: one file per engine, a parity gate, a kernel census."""

from compress.export.artifact import export_artifact
from compress.export.conversion import convert
from compress.export.counting import census
from compress.export.gates import Gates
from compress.export.targets import TARGETS, Census, ExportSkippedError
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length

__all__ = [
    "TARGETS",
    "Census",
    "ExportSkippedError",
    "Gates",
    "Length",
    "census",
    "convert",
    "export_artifact",
    "export_program",
]
