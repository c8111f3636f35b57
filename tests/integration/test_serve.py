"""scripts/serve.py as its user runs it."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.export import export_artifact
from compress.models import LSTMClassifier
from compress.runtime import load
from compress.runtime.manifest import Manifest, Range, TensorSpec
from compress.surgery.capture import export_program
from compress.surgery.lengths import Length
from tests.export.programs import HERE, artifact, edit, reviews

pytest.importorskip("litserve", reason="serving needs the extra 'serve'")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with served(artifact(), tmp_path_factory.mktemp("serve")) as number:
        yield number


@contextmanager
def served(path: Path, folder: Path, *options: str) -> Iterator[int]:
    with serving(path, folder, *options) as (_, number):
        yield number


@contextmanager
def serving(
    path: Path, folder: Path, *options: str, until: str = "up"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(path), "--port", str(number)]
    environment = {
        **os.environ,
        "COMPRESS_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
    }
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--engine", "onnxruntime", *options],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            if until == "up":
                _wait(process, number, log)
            else:
                _wait_for_children(process)
            yield process, number
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            if ask(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")


def _wait_for_children(process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while len(group(process.pid)) < 3:  # itself, the manager, the worker
        assert time.monotonic() < end
        time.sleep(0.05)


def group(leader: int) -> list[int]:
    """Return the living processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = entry.read_text().rpartition(")")[2].split()[:3]
            if int(number) == leader and state != "Z":
                found.append(int(entry.parent.name))
    return found


def samples(num: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num, 1, 8, 8)).astype(np.float32)


def test_requests_that_come_together_get_their_own_answers(port: int) -> None:
    raw = samples(60)
    labels, probabilities = load(artifact(), engine="onnxruntime").predict(raw)
    bodies = [json.dumps({"inputs": sample.tolist()}) for sample in raw]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: ask(port, "POST", "/predict", body), bodies))
    assert {status for status, _ in answers} == {200}
    assert [answer["label"] for _, answer in answers] == labels
    got = np.array([answer["probabilities"] for _, answer in answers])
    assert np.allclose(got, probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "JSON decode error"),
        ("{}", "Field required"),
        ('{"inputs": 3}', "valid list"),
        ('{"inputs": [1, 2, 3]}', r"expected one sample of shape [1, 8, 8], got [3]"),
        ('{"inputs": [["a"]]}', "expected nested lists of numbers"),
        ('{"inputs": [[1, 2], [3]]}', "expected nested lists of numbers"),
        (json.dumps({"inputs": np.full((1, 8, 8), "1").tolist()}), "expected nested lists of numbers, got values of"),
        (json.dumps({"inputs": np.full((1, 8, 8), None).tolist()}), "expected nested lists of numbers, got values of"),
        (json.dumps({"inputs": np.full((1, 8, 8), np.nan).tolist()}), "expected finite numbers"),
        (
            json.dumps({"inputs": np.full((1, 8, 8), 1e308).tolist()}),
            "that float32 holds, got larger ones in samples 0",
        ),
    ],
)
def test_malformed_requests_are_refused_and_harm_nobody(port: int, body: str, message: str) -> None:
    good = json.dumps({"inputs": samples(1)[0].tolist()})
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: ask(port, "POST", "/predict", text), [good, body, good, body]))
    assert [status for status, _ in answers] == [200, 422, 200, 422]
    assert message in answers[1][1]["detail"][0]["message"]


def test_samples_of_several_lengths_come_together_and_none_is_padded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = LSTMClassifier(3, 5, 8, 1).eval(), torch.randn(20, 9, 3)
    program = export_program(network, [x[:2]], lengths=[Length(1, 2, 24)])
    export_artifact(program, tmp_path / "a", targets=["onnxruntime"], reference=network, held_out=[x])
    samples = [torch.randn(2 + i % 5, 3) for i in range(30)]
    with torch.no_grad():
        wanted = [network(sample[None]).softmax(-1)[0] for sample in samples]
    bodies = [json.dumps({"inputs": sample.tolist()}) for sample in [*samples, torch.randn(1, 3), torch.randn(25, 3)]]
    # Long enough that they do come together.
    with served(tmp_path / "a", tmp_path, "--batch_timeout", "0.2") as port, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: ask(port, "POST", "/predict", body), bodies))
    assert [status for status, _ in answers] == [200] * 30 + [422] * 2
    got = torch.tensor([answer["probabilities"] for _, answer in answers[:30]])
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=1e-4)
    for (_, answer), size in zip(answers[30:], (1, 25)):
        assert f"x: expected a size from 2 to 24 in dimension 1, got {size}." in answer["detail"][0]["message"]


@pytest.mark.parametrize("says", [True, False], ids=["manifest", "network"])
def test_a_token_that_the_network_does_not_know_harms_nobody(says: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    tokens = torch.randint(8, (12, 3), generator=torch.Generator().manual_seed(0))
    program = export_program(network, [tokens[:2]])
    export_artifact(program, tmp_path / "a", targets=["onnxruntime"], reference=network, held_out=[tokens])
    if not says:  # as of artefacts that were exported before it said so
        edit(tmp_path / "a", lambda content: content["inputs"][0].pop("num_rows"))
    bodies = [json.dumps({"inputs": sample}) for sample in [*tokens.tolist(), [1, 2, 99], [1, 2, 0.5], ["1", "2", "3"]]]
    # Long enough that they do come together.
    with served(tmp_path / "a", tmp_path, "--batch_timeout", "0.2") as port, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: ask(port, "POST", "/predict", body), bodies))
    assert [status for status, _ in answers] == [200] * 12 + [422] * 3
    assert [answer["label"] for _, answer in answers[:12]] == network(tokens).argmax(1).tolist()
    messages = [answer["detail"][0]["message"] for _, answer in answers[12:]]
    for message, part in zip(
        messages,
        ("from 0 to 7, the rows" if says else "that the network takes", "whole numbers", "nested lists of numbers"),
    ):
        assert part in message


def test_texts_get_their_labels(tmp_path: Path) -> None:
    texts = ["a fine film", "dull", "fine " * 20, "never heard of"] * 5
    bodies = [json.dumps({"inputs": text}) for text in texts]
    wrong = [json.dumps({"inputs": [2, 4, 6, 3, 0, 0, 0]}), '{"inputs": "\\ud800"}']
    with served(reviews().artifact, tmp_path) as port, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: ask(port, "POST", "/predict", body), [*bodies, *wrong]))
    assert [status for status, _ in answers] == [200] * 20 + [422] * 2
    labels, probabilities = load(reviews().artifact, engine="onnxruntime").predict(texts)
    assert [answer["label"] for _, answer in answers[:20]] == labels
    got = np.array([answer["probabilities"] for _, answer in answers[:20]])
    assert np.allclose(got, probabilities, atol=1e-6)
    assert "expected a text, got another kind" in answers[20][1]["detail"][0]["message"]


def test_a_body_longer_than_any_sample_is_refused_and_harms_nobody(port: int) -> None:
    long = json.dumps({"inputs": [1] * 600_000})
    good = json.dumps({"inputs": samples(1)[0].tolist()})
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: ask(port, "POST", "/predict", body), [long, good, long]))
    assert [status for status, _ in answers] == [413, 200, 413]
    assert ask(port, "POST", "/predict", json.dumps({"inputs": [1] * 300_000}))[0] == 422  # it was read


def test_the_longest_body_is_that_of_the_largest_sample_in_full_length() -> None:
    def longest(*shape: int | None, **more: Any) -> int:
        ranges = {2: Range("time", 1, more.get("largest"), 100)} if None in shape[2:] else {}
        specs = (TensorSpec("x", "float32", (None, *shape[1:]), ranges),)
        return serve.longest_body(Manifest("m", "", "", specs, specs, {}, preprocessing=more.get("preprocessing")))

    serve = script()
    sample = np.random.default_rng(0).standard_normal((3, 224, 224)) * 1e-100
    for indent in (None, 0):
        assert len(json.dumps({"inputs": sample.tolist()}, indent=indent)) < longest(None, 3, 224, 224) < 6e6
    assert longest(None, 8) == longest(None, None) == 1e6
    assert longest(None, 64, None, largest=2000) == 32 * 64 * 2000
    assert longest(None, 64, None) == 32 * 64 * 1600
    assert longest(None, 8, preprocessing={"tokenizer": "t.json", "length": 10**5}) == 32 * 10**5


def test_workers_share_the_cores_and_the_longest_body_can_be_set(tmp_path: Path) -> None:
    good = json.dumps({"inputs": samples(1)[0].tolist()})
    options = ("--workers", "2", "--threads", "1", "--max_body_mb", "0.003")
    with served(artifact(), tmp_path, *options) as port:
        assert [ask(port, "POST", "/predict", body)[0] for body in (good, good + 2000 * " ")] == [200, 413]
    serve = script()
    cores = serve.describe_machine()["cores"]
    assert [serve._share(workers) for workers in (1, 2, 10**4)] == [None, max(1, cores // 2), 1]
    api = serve.Served("a", engine="e", trust=False, max_batch_size=2, batch_timeout=0, threads=3)
    asked: dict[str, Any] = {}
    serve.compress = SimpleNamespace(load=lambda path, **more: asked.update(more))
    api.setup("cpu")
    assert asked == {"engine": "e", "num_threads": 3, "trust": False}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("engine", "until"), [("onnxruntime", "up"), ("aoti", "up"), ("onnxruntime", "starting")])
def test_a_server_that_is_told_to_stop_leaves_nothing_behind(engine: str, until: str, tmp_path: Path) -> None:
    if engine not in HERE:
        pytest.skip(f"{engine} is not here")
    with serving(artifact(), tmp_path, "--engine", engine, until=until) as (process, number):
        os.kill(process.pid, signal.SIGTERM)  # it alone, as a supervisor does
        time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)  # once more, on its way out
        assert process.wait(30) == 0
        end = time.monotonic() + 5  # what watches over semaphores ends when nobody is left
        while (left := group(process.pid)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left
        with socket.socket() as free:
            free.bind(("127.0.0.1", number))
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "log", ".ses")]  # ONNX Runtime's
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_other_paths_and_methods(port: int) -> None:
    assert ask(port, "GET", "/health") == (200, "ok")
    assert ask(port, "GET", "/nowhere")[0] == 404
    assert ask(port, "GET", "/predict")[0] == 405


def test_what_cannot_be_served_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path(shutil.copytree(reviews().artifact, tmp_path / "plain"))
    edit(plain, lambda content: content.update(preprocessing=None))
    numbers = Path(shutil.copytree(artifact(), tmp_path / "numbers"))
    edit(numbers, lambda content: content["outputs"][0].update(shape=[None, 5, 3]))
    damaged, unsigned, words = (Path(shutil.copytree(artifact(), tmp_path / name)) for name in ("d", "u", "w"))
    flip(damaged / "model.onnx")
    (unsigned / "signature.json").write_text("[3]")
    edit(words, lambda content: content.update(targets={}))
    for path, options, message in [
        (tmp_path, (), "expected an artefact with a manifest.json, got none"),
        (plain, (), "expected an artefact of one input, or with a tokenizer, got 2 inputs"),
        (numbers, (), "expected an output of shape (N, classes) to predict a label of each sample, got (N, 5, 3)"),
        (damaged, (), "model.onnx: expected SHA-256"),
        (unsigned, (), "signature.json: expected the manifest's checksum, got "),
        (words, (), "--engine: expected one that runs here, got none (none that this version knows)"),
        (artifact(), ("--engine", "quantum"), "--engine: expected auto or one of eager, "),
        (artifact(), ("--workers", "0"), "--workers: expected at least 1, got 0. Use 1."),
        (artifact(), ("--threads", "0"), "--threads: expected a number from 1 to "),
        (artifact(), ("--port", "99999"), "--port: expected a number from 1024 to 65535, got 99999. Use 8000."),
        (artifact(), ("--batch_timeout", "-1"), "--batch_timeout: expected a number from 0 to 60, got -1.0."),
        (artifact(), ("--max_body_mb", "nan"), "--max_body_mb: expected a number from 0.001 to 1e+06, got nan."),
        (artifact(), ("--host", "here"), "--host: invalid choice: 'here'"),
    ]:
        assert message in refusal(capsys, monkeypatch, path, *options)
    monkeypatch.setenv("COMPRESS_KEY", str(tmp_path / "another"))
    assert "eager: its file may run code" in refusal(capsys, monkeypatch, artifact(), "--engine", "eager")
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> str:
    """Return the line with which the script refuses to start."""
    monkeypatch.setattr(sys, "argv", ["serve.py", str(path), *options])
    with pytest.raises(SystemExit) as left:
        script().main()
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve", ROOT / "scripts" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
