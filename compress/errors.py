"""The errors a user can meet.

Every message reads ``where: expected X, got Y. Do Z.``; the command line prints it alone, without a traceback,
and ends with exit code 2.
"""

__all__ = [
    "ArtifactError",
    "CaptureError",
    "CompressError",
    "DataError",
    "EditError",
    "EngineError",
    "ExportError",
    "ExportSkippedError",
    "MissingPackageError",
    "RecipeError",
    "RunError",
    "first_line",
]

# PyPI's `compress` is another project, so extras are installed from the checkout.
_INSTALL_EXTRA = "pip install -e '.[{extra}]' (in the checkout of compress)"


class CompressError(Exception):
    """Anything that the user can mend; its message says how."""


class RecipeError(CompressError):
    """A recipe or an argument holds a value that cannot be used."""


class DataError(CompressError):
    """Data is missing or has an unexpected form."""


class CaptureError(CompressError):
    """``torch.export`` or PT2E cannot capture a model."""


class EditError(CompressError):
    """A structural change cannot be planned, applied or replayed."""


class ExportError(CompressError):
    """An artefact fails one of its checks; nothing is written."""


class ExportSkippedError(CompressError):
    """A target cannot be built on this machine, or from this network; the others can."""


class ArtifactError(CompressError):
    """An artefact cannot be read or served."""


class EngineError(CompressError):
    """An engine cannot start on this machine; another may."""


class RunError(CompressError):
    """A run directory cannot be used as asked."""


class MissingPackageError(CompressError):
    """A package is needed and absent.

    Args:
        package: What to install.
        extra: The optional dependencies of ours that hold it; none where ``compress`` itself asks for it.
    """

    def __init__(self, package: str, extra: str | None = None) -> None:
        how = f"pip install {package}" if extra is None else _INSTALL_EXTRA.format(extra=extra)
        super().__init__(f"{package}: expected an installed package, got none. Install it with: {how}.")


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says, or its kind where it says nothing.

    Example:
        >>> first_line(ValueError("expected less\nat line 3")), first_line(ValueError())
        ('expected less', 'ValueError')
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
