"""What goes wrong ends in the right status, and the server lives."""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bothways.serve.engine import Engine
from bothways.serve.http import Settings
from bothways.serve.runs import Limits, Runs, named
from tests.serve.conftest import Running

ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/rerank",
    "/score",
    "/fill",
    "/tokens",
    "/classify",
)


def wait_for(what, seconds=30):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_two_hundred_malformed_bodies_are_refused(http):
    rng = random.Random(0)
    values = [None, -1, 10**30, "", "x", [], {}, [[]], True, 1e308, "\u0000", ["a", 1], {"a": {}}]
    names = [
        "model",
        "prompt",
        "messages",
        "input",
        "max_tokens",
        "n",
        "text",
        "documents",
        "query",
        "stop",
        "seed",
        "logprobs",
    ]
    for i in range(200):
        body = json.dumps({"model": "causal"} | {rng.choice(names): rng.choice(values) for _ in range(4)}).encode()
        if i % 4 == 0:
            body = body[: rng.randrange(len(body))] + rng.randbytes(3)
        answer = http.post(rng.choice(ENDPOINTS), content=body)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in answer.text
    assert http.post("/score", content=b"[" * 100_000).status_code == 400
    assert http.post("/score", content=b"x" * (2**20 + 1)).status_code == 413
    assert http.get("/score").status_code == 405
    assert http.get("/health").json() == {"status": "ok"}


def test_a_client_that_vanishes_frees_its_slot(running, http):
    body = {"model": "causal", "prompt": "the king", "max_tokens": 40, "seed": 11, "n": 8, "stream": True}
    loaded = running.engine.runs.loaded
    http.post("/v1/completions", json=body | {"stream": False, "max_tokens": 2, "n": 1})
    steps = loaded["causal"].pool.step
    loaded["causal"].pool.step = lambda n=1: (time.sleep(0.05), steps(1))[1]  # so that it is still at it
    try:
        with httpx.Client(base_url=running.url) as client, client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
            assert running.engine.busy_slots + running.engine.waiting > 0
        wait_for(lambda: running.engine.busy_slots + running.engine.waiting == 0, 1.5)
    finally:
        loaded["causal"].pool.step = steps


@pytest.fixture
def small(homes):
    """A server with one slot, one place in its queue, and a key."""
    runs = Runs(named([str(homes["causal"])]), Limits(slots=1, piece=16))
    with Running(Engine(runs, queue=1), Settings(api_key="open sesame", seconds=2.0, max_tokens=30)) as server:
        yield server


def test_a_full_queue_a_key_a_limit_on_time_and_on_tokens(small):
    with httpx.Client(base_url=small.url, timeout=60) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for key in ({}, {"Authorization": "Bearer open"}, {"Authorization": "open sesame\u00e9".encode()}):
            answer = client.get("/v1/models", headers=key)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        client.headers["Authorization"] = "Bearer open sesame"
        assert client.get("/v1/models").status_code == 200
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://a"}).headers
        body = {"model": "causal", "prompt": "the king", "max_tokens": 8}
        assert "at most 30" in client.post("/v1/completions", json=body | {"n": 4}).json()["error"]["message"]
        wait_for(lambda: client.post("/v1/completions", json=body).status_code == 200, 60)  # it may compile at first
        pool = small.engine.runs.loaded["causal"].pool
        steps = pool.step
        pool.step = lambda n=1: (time.sleep(0.5), steps(1))[1]
        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: client.post("/v1/completions", json=body), range(6)))
        statuses = [a.status_code for a in answers]
        assert set(statuses) == {429, 504}
        assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 429)
        pool.step = steps
        wait_for(lambda: small.engine.busy_slots + small.engine.waiting == 0)
        assert client.post("/v1/completions", json=body).status_code == 200


def test_a_damaged_run_and_one_without_memory_are_unavailable_and_others_go_on(homes, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(homes["causal"], damaged)
    for path in (damaged / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    served = named([str(damaged), str(homes["masked"]), str(homes["hybrid"])])
    sizes = [run.bytes for run in served.values()]
    runs = Runs(served, Limits(slots=999, piece=16, memory=max(sizes)))
    with Running(Engine(runs)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/v1/completions", json={"model": "damaged", "prompt": "a", "stream": True}).status_code == 503
        for model in ("masked", "hybrid", "masked"):
            answer = client.post("/v1/embeddings", json={"model": model, "input": "the king"})
            expected = 200 if model == "masked" else 503  # so many slots do not fit
            assert answer.status_code == expected, answer.text
        runs.limits = Limits(slots=2, piece=16, memory=sum(sizes) - 1_000)
        for model in ("masked", "hybrid", "masked"):
            assert client.post("/v1/embeddings", json={"model": model, "input": "the king"}).status_code == 200
            assert sum(one.bytes for one in runs.loaded.values()) <= runs.limits.memory


def test_a_fault_while_writing_is_an_error_of_its_own_and_the_engine_goes_on(running, http):
    body = {"model": "causal", "prompt": "the king", "max_tokens": 4, "seed": 1}
    before = http.post("/v1/completions", json=body).json()
    pool = running.engine.runs.loaded["causal"].pool
    steps = pool.step

    def fails(n=1):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    pool.step = fails
    try:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 503
        assert "memory" in answer.json()["error"]["message"]
    finally:
        pool.step = steps
    assert http.post("/v1/completions", json=body).json()["choices"] == before["choices"]


def test_sigterm_lets_running_requests_end(homes, tmp_path):
    port = 20_000 + os.getpid() % 20_000
    args = ["serve", str(homes["causal"]), "--port", str(port), "--slots", "2"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "bothways", *args], stderr=log)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

        def up():
            try:
                return client.get("/health").status_code == 200
            except httpx.ConnectError:
                return False

        wait_for(up, 60)
        body = {"model": "causal", "prompt": "the king", "max_tokens": 40, "seed": 2}
        with concurrent.futures.ThreadPoolExecutor(5) as threads:
            answers = [threads.submit(client.post, "/v1/completions", json=body | {"seed": i}) for i in range(5)]
            wait_for(lambda: "is loaded" in Path(tmp_path / "log").read_text(), 60)
            process.send_signal(signal.SIGTERM)
            assert [a.result().status_code for a in answers] == [200] * 5
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert "serving causal at" in (tmp_path / "log").read_text()
