"""Knowledge distillation and model compression on PyTorch Lightning: from a recipe to a checked, fast artefact."""

__version__ = "0.1.0"
