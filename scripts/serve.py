"""Serve an artefact over HTTP with LitServe: requests that come together become one batch.

    python scripts/serve.py runs/digits/<time>/artifact --port 8000
    curl 127.0.0.1:8000/predict -H 'content-type: application/json' -d '{"inputs": [[0, 3, ...], ...]}'

POST /predict takes one raw sample as nested lists, or as a text where the artefact holds a tokenizer, and gives its
label and probabilities; GET /health says whether the server is ready. A sample of another shape, or with values that
are no numbers, gets status 422 and never meets others; one that the network refuses gets it, too, and those beside it
are served. Where sizes may vary, samples of one shape become one batch: none is padded. A body beyond ``--max_body_mb``
gets status 413: it is read where /health is answered, too. An artefact whose output (of several the one called
``logits``, else the first) is not of shape (N, classes) is refused at the start: it has no labels to answer with.
"""

import argparse
import atexit
import functools
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import EventProxy
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, field_validator

import compress
from compress.errors import ArtifactError, CompressError
from compress.measure.machine import describe_machine, most_threads
from compress.runtime.classes import check_classes, check_scores, scores
from compress.runtime.engines import ENGINES, engines_for
from compress.runtime.examples import example_sizes, largest_sizes
from compress.runtime.inputs import check_rows, preprocess
from compress.runtime.loading import why_left_out
from compress.runtime.manifest import Manifest, check_file, check_files, preprocesses_text, read_manifest
from compress.runtime.sizes import wrong_size
from compress.runtime.text import Encode, make_encoder
from compress.runtime.trust import Signed, read_signed

Sample = np.ndarray | str
Prediction = tuple[Any, np.ndarray] | Exception
_SERVED = "COMPRESS_SERVED"
_VALUE_BYTES = 32  # of a float64 as JSON writes it, with a comma and a blank or two
_LEAST_BYTES = 1_000_000  # of the longest body, however small the input: it takes some hundredths of a second
_WAITS = {
    litserve.LitServer.verify_worker_status.__code__,
    EventProxy.wait.__code__,
}  # where LitServe's first process is
_manifest = functools.cache(read_manifest)
_PATIENCE = 5  # seconds, after which a process that was told to stop is ended


class Query(BaseModel):
    """One raw sample; checked where requests arrive, since a batch succeeds or fails as a whole."""

    inputs: list[Any] | str

    @field_validator("inputs")
    @classmethod
    def fits(cls, value: list[Any] | str) -> list[Any] | str:
        """Refuse what the network cannot take.

        Raises:
            ValueError: which becomes status 422.
        """
        manifest = _manifest(os.environ[_SERVED])
        reads = preprocesses_text(manifest.preprocessing or {})
        if reads != isinstance(value, str):
            raise ValueError(f"expected {'a text' if reads else 'nested lists of numbers'}, got another kind")
        try:
            if isinstance(value, str):
                _encoder(os.environ[_SERVED])([value])
                return value
            sample = _numbers(value)
            wanted = manifest.inputs[0].shape[1:]
            if not any(_fits(sample.shape, shape) for shape in (wanted, wanted[1:] if wanted[:1] == (1,) else wanted)):
                raise ValueError(f"expected one sample of shape {list(wanted)}, got {list(sample.shape)}")
            given = preprocess(sample[None], manifest)
            check_rows([given], manifest.inputs)
        except CompressError as error:
            raise ValueError(str(error)) from error
        reason = wrong_size(manifest.inputs[:1], [given.shape])
        if reason:
            raise ValueError(reason)
        if not np.isfinite(given).all():
            raise ValueError("expected finite numbers")
        return value


class Served(litserve.LitAPI):
    """Predictions of an artefact.

    Args:
        path: Its directory.
        engine: Name of an engine, or ``"auto"`` for the fastest here.
        trust: Whether an artefact that was built elsewhere may run its code.
        max_batch_size: Most samples that are run at once.
        batch_timeout: Seconds that the first of a batch waits for others.
        threads: Threads of one call; the engine's default without it.
    """

    def __init__(
        self, path: str, *, engine: str, trust: bool, max_batch_size: int, batch_timeout: float, threads: int | None
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout)
        self.path, self.engine, self.trust, self.threads = path, engine, trust, threads

    def setup(self, device: str) -> None:
        """Load the artefact in the process that runs it, which ends as others do when it is told to stop."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        atexit.register(vars(self).pop, "model", None)  # a package that was unpacked is removed with its model
        self.model = compress.load(self.path, engine=self.engine, num_threads=self.threads, trust=self.trust)

    def decode_request(self, request: Query) -> Sample:
        """Return the sample."""
        return request.inputs if isinstance(request.inputs, str) else _numbers(request.inputs)

    def batch(self, inputs: list[Sample]) -> list[Sample]:
        """Leave samples as they are: they need not have one shape."""
        return inputs

    def predict(self, samples: list[Sample]) -> list[Prediction]:
        """Return label and probabilities of each sample; those of one shape run at once, and so do all texts."""
        found: dict[int, Prediction] = {}
        for shape in {np.shape(sample) for sample in samples}:
            places = [place for place, sample in enumerate(samples) if np.shape(sample) == shape]
            found.update(zip(places, self._predict([samples[place] for place in places])))
        return [found[place] for place in range(len(samples))]

    def _predict(self, alike: list[Sample]) -> list[Prediction]:
        """Predict samples of one shape; where the network refuses what one of them holds, the others are served."""
        try:
            return list(zip(*self.model.predict(alike if isinstance(alike[0], str) else np.stack(alike))))
        except Exception as error:  # a token beyond the vocabulary, say
            if len(alike) == 1:
                self._try()
                return [error]
            return [prediction for sample in alike for prediction in self._predict([sample])]

    def _try(self) -> None:
        """Raise where nothing runs any more: then the sample before is not to blame, and status 500 says so."""
        outputs = self.model(*(np.zeros((1, *example_sizes(spec)), spec.dtype) for spec in self.model.manifest.inputs))
        check_scores(np.asarray(scores(outputs, self.model.manifest)), self.model.manifest)

    def unbatch(self, output: list[Prediction]) -> list[Prediction]:
        """Return one output for each sample."""
        return output

    def encode_response(self, output: Prediction) -> Any:
        """Return what is sent: an answer, or the reason against one."""
        if isinstance(output, Exception):
            reason = " ".join(str(output).split())[:300]
            message = f"expected a sample that the network takes, got {type(output).__name__}: {reason}"
            return JSONResponse({"detail": [{"where": ["body", "inputs"], "message": message}]}, status_code=422)
        label, probabilities = output
        return {"label": label, "probability": float(probabilities.max()), "probabilities": probabilities.tolist()}


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Say what is wrong with a request; FastAPI would send it back whole, infinities included, which JSON has not."""
    assert isinstance(error, RequestValidationError)
    reasons = [{"where": list(each["loc"]), "message": each["msg"]} for each in error.errors()]
    return JSONResponse({"detail": reasons}, status_code=422)


def main() -> None:
    """Serve until stopped."""
    parser = _parser()
    options = parser.parse_args()
    path = (options.artifact / "artifact" if (options.artifact / "artifact").is_dir() else options.artifact).resolve()
    try:
        _check_numbers(options)
        manifest = _checked(path, options.engine, trust=options.trust)
    except CompressError as error:
        parser.error(" ".join(str(error).split()))
    os.environ[_SERVED] = str(path)
    api = Served(
        str(path),
        engine=options.engine,
        trust=options.trust,
        max_batch_size=options.max_batch_size,
        batch_timeout=options.batch_timeout,
        threads=options.threads or _share(options.workers),
    )
    most = int(options.max_body_mb * 1e6) if options.max_body_mb else longest_body(manifest)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=options.workers, max_payload_size=most)
    server.app.add_exception_handler(RequestValidationError, refuse)
    with stops():
        server.run(host=options.host, port=options.port, generate_client_file=False, log_level="warning")


@contextmanager
def stops() -> Iterator[None]:
    """Let SIGTERM do what Ctrl+C does, and leave no process behind that this one has started.

    LitServe sees to no signal: its children would go on; the first process of a container has not even a default.
    """
    ours = os.getpid()

    def stop(_: int, frame: Any) -> None:
        if os.getpid() == ours and not any(at.f_code in _WAITS for at, _ in traceback.walk_stack(frame)):
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # again soon: nobody would know a child that is half started
            return
        # Once is enough, in a process that is on its way out; what was forked stops as if this were not here.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if os.getpid() == ours else signal.SIG_DFL)
        if os.getpid() == ours:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        yield
    except KeyboardInterrupt:
        pass  # before LitServe sees to it: while engines are loaded
    finally:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # told again, it is on its way out
        signal.setitimer(signal.ITIMER_REAL, 0)
        children = [child for child in multiprocessing.active_children() if "Manager" not in child.name]  # it tidies up
        for child in children:
            child.terminate()
        for child in children:
            child.join(_PATIENCE)
            child.kill()


def longest_body(manifest: Manifest) -> int:
    """Return how many bytes a request may have: what the largest sample takes as numbers of full length, or 1 MB."""
    steps = manifest.preprocessing or {}
    num = steps["length"] if preprocesses_text(steps) else math.prod(largest_sizes(manifest.inputs[0]))
    return max(_LEAST_BYTES, _VALUE_BYTES * num)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT")
    hosts = ("127.0.0.1", "0.0.0.0", "::")
    add("--host", default=hosts[0], choices=hosts, help="address to listen on (default: this machine's own only)")
    add("--port", type=int, default=8000)
    add("--engine", default="auto", help="engine to serve with (default: the fastest here)")
    add("--trust", action="store_true", help="let an artefact that was built elsewhere run its code")
    add("--max_batch_size", type=int, default=32, metavar="N", help="most samples run at once")
    add("--batch_timeout", type=float, default=0.002, metavar="S", help="seconds to wait for others")
    add("--workers", type=int, default=1, metavar="N", help="processes that run the network")
    add("--threads", type=int, metavar="N", help="threads of each of them (default: its share of the cores)")
    add("--max_body_mb", type=float, metavar="MB", help="longest request (default: by the input's size, at least 1)")
    return parser


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse what LitServe, or a process of it, would raise an error about.

    Raises:
        ArtifactError: which names the option.
    """
    for name, least, most, instead in (
        ("port", 1024, 65535, 8000),
        ("max_batch_size", 2, math.inf, 32),
        ("batch_timeout", 0, 60, 0.002),
        ("workers", 1, math.inf, 1),
        ("threads", 1, most_threads(), 1),
        ("max_body_mb", 1e-3, 1e6, 1),
    ):
        number = getattr(options, name)
        if number is not None and not least <= number <= most:
            limit = f"at least {least}" if most == math.inf else f"a number from {least:g} to {most:g}"
            raise ArtifactError(f"--{name}: expected {limit}, got {number}. Use {instead}.")


def _checked(path: Path, engine: str, *, trust: bool) -> Manifest:
    """Return an artefact's manifest once it can be served; what a worker finds wrong comes as its traceback.

    Raises:
        CompressError: when it cannot.
    """
    signed = read_signed(path)
    manifest = signed.manifest
    check_classes(manifest)
    reads = preprocesses_text(manifest.preprocessing or {})
    if len(manifest.inputs) > 1 and not reads:
        raise ArtifactError(
            f"{path}: expected an artefact of one input, or with a tokenizer, got {len(manifest.inputs)} inputs. "
            "Call the model itself."
        )
    _check_engine(engine, signed, trust=trust)
    for target in manifest.targets.values():
        check_file(path, target)
    check_files(path, manifest.files)
    if reads:
        _encoder(str(path))
    return manifest


def _check_engine(engine: str, signed: Signed, *, trust: bool) -> None:
    """Refuse an engine that the artefact has not, or of which nothing can run here."""
    targets = signed.manifest.targets
    names = [name for name in engines_for(targets, "auto") if name in ENGINES]
    if engine not in ("auto", *names):
        raise ArtifactError(f"--engine: expected auto or one of {', '.join(names)}, got {engine}. Export that target.")
    wanted = names if engine == "auto" else [engine]
    reasons = {name: why_left_out(name, signed.manifest, trusted=signed.ours or trust) for name in wanted}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none that this version knows"
        raise ArtifactError(f"--engine: expected one that runs here, got none ({why}). Name another, or install one.")


def _share(workers: int) -> int | None:
    """Return the threads of each of several workers; one alone has the engine's default, all cores."""
    return max(1, int(describe_machine()["cores"]) // workers) if workers > 1 else None


def _numbers(value: list[Any]) -> np.ndarray:
    """Return nested lists as an array; those of several lengths, texts and gaps are no numbers.

    Raises:
        ValueError: which becomes status 422 where requests arrive.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected nested lists of numbers, got {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"expected nested lists of numbers, got values of type {array.dtype}")
    return array.astype(np.float64)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, given) for size, given in zip(wanted, shape))


@functools.cache
def _encoder(path: str) -> Encode:
    steps = _manifest(path).preprocessing or {}
    return make_encoder((Path(path) / steps["tokenizer"]).read_text(encoding="utf-8"), steps)


if __name__ == "__main__":
    main()
