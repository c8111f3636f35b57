"""Requests a second and latencies of scripts/serve.py under load from this machine, beside calls without HTTP."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import Row, finish, options

import compress
from compress.runtime.examples import example_sizes

_SCRIPT = Path(__file__).parents[1] / "serve.py"


def main() -> None:
    """Serve an artefact, ask it from several connections for some seconds each, and stop it again."""
    arguments = options(__doc__ or "", _more)
    seconds = 3.0 if arguments.quick else 15.0
    model = compress.load(arguments.artifact, trust=arguments.trust)
    shape = example_sizes(model.manifest.inputs[0])
    samples = np.random.default_rng(0).random((64, *shape))
    rows = [Row(f"without HTTP, {model.engine}, batch 1", "calls", _alone(model, samples, seconds), "1/s")]
    bodies = [json.dumps({"inputs": sample.tolist()}) for sample in samples]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(_SCRIPT), str(arguments.artifact), "--port", str(port), "--engine", model.engine]
    command += ["--trust"] if arguments.trust else []
    server = subprocess.Popen(command, start_new_session=True)
    try:
        _wait(server, port)
        for connections in arguments.connections:
            rows += _load(port, bodies, connections, seconds)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    finish(arguments, rows)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--trust", action="store_true", help="let an artefact that was built elsewhere run its code")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32], metavar="N")


def _alone(model: compress.CompactModel, samples: np.ndarray, seconds: float) -> float:
    done, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        model.predict(samples[done % len(samples)][None])
        done += 1
    return done / seconds


def _load(port: int, bodies: Sequence[str], connections: int, seconds: float) -> list[Row]:
    """Ask from so many connections, each waiting for its answer before the next request."""
    until = time.perf_counter() + seconds

    def ask(_: int) -> list[tuple[float, int]]:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        seen = []
        while (began := time.perf_counter()) < until:
            link.request("POST", "/predict", bodies[len(seen) % len(bodies)], {"content-type": "application/json"})
            answer = link.getresponse()
            answer.read()
            seen.append((time.perf_counter() - began, answer.status))
        link.close()
        return seen

    with ThreadPoolExecutor(connections) as pool:
        answers = [each for seen in pool.map(ask, range(connections)) for each in seen]
    times = 1e3 * np.array([taken for taken, _ in answers])
    statuses = Counter(status for _, status in answers)
    name = f"{connections} connections"
    return [
        Row(name, "requests", len(answers) / seconds, "1/s"),
        Row(name, "p50", float(np.percentile(times, 50)), "ms"),
        Row(name, "p99", float(np.percentile(times, 99)), "ms"),
        Row(name, "errors", sum(count for status, count in statuses.items() if status != 200), ""),
    ]


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            link.request("GET", "/health")
            if link.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            link.close()
        time.sleep(0.3)
    raise SystemExit("the server did not come up")


if __name__ == "__main__":
    main()
