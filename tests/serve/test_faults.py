"""What goes wrong ends in the right status, and the server lives."""

import asyncio
import concurrent.futures
import json
import os
import queue
import random
import shutil
import signal
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

import bothways
from bothways.commands import serve as command
from bothways.errors import InputError
from bothways.serve import ask, compute, slots
from bothways.serve.app import listen
from bothways.serve.engine import Call, Engine
from bothways.serve.http import Settings
from bothways.serve.runs import Limits, Runs, named
from tests.conftest import HANGS
from tests.serve.conftest import SLOTS, Running, trained_tokenizer

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


def wait_for(what, seconds=60):
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


def test_a_client_that_vanishes_frees_its_slot(running, http, monkeypatch):
    body = {"model": "causal", "prompt": "the king", "max_tokens": 40, "seed": 11, "n": 8, "stream": True}
    http.post("/v1/completions", json=body | {"stream": False, "max_tokens": 2, "n": 1})
    pool, known, calls = running.engine.runs.loaded["causal"].pool, threading.Event(), []

    def step(n=1):
        calls.append(n)
        assert len(calls) < 3 or known.wait(HANGS)
        return slots.Pool.step(pool, 1)

    monkeypatch.setattr(pool, "step", step)
    with httpx.Client(base_url=running.url) as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # kept, since without it the connection is closed
        next(lines)
        wait_for(lambda: len(calls) == 3)
        held = [row for row in pool.rows if row is not None]
    wait_for(lambda: all(row.gone() for row in held))
    assert held
    known.set()
    wait_for(lambda: running.engine.busy_slots + running.engine.waiting == 0)
    assert len(calls) <= 4


@pytest.fixture
def small(homes):
    """A server with a queue of one, and a key."""
    runs = Runs(named([str(homes["causal"])]), Limits(**SLOTS))
    with Running(
        Engine(runs, queue=1), Settings(api_key="open sesame", seconds=2.0, max_tokens=30, max_input=40)
    ) as server:
        yield server


def test_a_full_queue_a_key_a_limit_on_time_and_on_tokens(small):
    with httpx.Client(base_url=small.url, timeout=HANGS) as client:
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
        never = client.post("/v1/completions", json=body | {"n": 2})
        assert never.status_code == 400
        assert "the queue holds 1" in never.json()["error"]["message"]
        wait_for(lambda: client.post("/v1/completions", json=body).status_code == 200)  # it may compile at first
        engine, go_on = small.engine, threading.Event()
        pool = engine.runs.loaded["causal"].pool
        steps = pool.step
        pool.step = lambda n=1: (go_on.wait(HANGS), steps(1))[1]
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            held = []
            # One that is being written holds the engine's thread; the next one waits, and fills the queue.
            for busy, waiting in ((1, 0), (1, 1)):
                held.append(threads.submit(client.post, "/v1/completions", json=body))
                wait_for(lambda busy=busy, waiting=waiting: (engine.busy_slots, engine.waiting) == (busy, waiting))
            refused = client.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert refused.headers["Retry-After"] == "1"
            assert [one.result(60).status_code for one in held] == [504, 504]  # after the two seconds of `small`
            go_on.set()
        pool.step = steps
        wait_for(lambda: engine.busy_slots + engine.waiting == 0)
        wait_for(lambda: client.post("/v1/completions", json=body).status_code == 200)


def test_what_a_slot_has_no_room_for_is_refused(homes):
    """Of slots shorter than the run's context; what fits into one is answered as with the whole context."""
    answers, encode = [], trained_tokenizer().encode
    long = next(text for n in range(1, 48) if len(encode(text := "the king " * n)) > 32)
    for context in (32, 2048):
        runs = Runs(named([str(homes["causal"]), str(homes["pairs"])]), Limits(**SLOTS, context=context))
        with Running(Engine(runs, queue=4)) as server, httpx.Client(base_url=server.url, timeout=HANGS) as client:
            fits = {"model": "causal", "prompt": "the king", "max_tokens": 20, "seed": 3}
            answers.append(client.post("/v1/completions", json=fits).json()["choices"][0]["text"])
            assert client.get("/v1/models/causal").json()["context_length"] == min(context, 48)
            for model, prompt, most in (("causal", "the king", 40), ("causal", long, 4), ("pairs", long, 4)):
                asked = {"model": model, "prompt": prompt, "max_tokens": most}
                found = client.post("/v1/completions", json=asked)
                assert found.status_code == (400 if context == 32 else 200), (asked, found.text)
                if context == 32:
                    assert "context is 32 tokens here" in found.json()["error"]["message"]
                    assert "serve it with --context 48 at most" in found.json()["error"]["message"]
            assert client.post("/v1/completions", json=fits | {"stop": ["z", ""]}).status_code == 400
    assert answers[0] == answers[1]


def test_texts_of_a_request_are_counted_while_others_are_answered(small, monkeypatch):
    encode, begun, go = small.engine.runs.served["causal"].tokenizer.encode_many, threading.Event(), threading.Event()

    def slow(texts):
        begun.set()
        assert go.wait(HANGS)
        return encode(texts)

    with httpx.Client(base_url=small.url, timeout=HANGS, headers={"Authorization": "Bearer open sesame"}) as client:
        body = {"model": "causal", "input": ["the king"] * 41}
        for path, more in (
            ("/v1/embeddings", {}),
            ("/score", {}),
            ("/rerank", {"query": "the", "documents": body["input"]}),
        ):
            answer = client.post(path, json=body | more if path != "/rerank" else {"model": "causal"} | more)
            assert answer.status_code == 400
            assert "at most 40 are read at once" in answer.json()["error"]["message"]
        monkeypatch.setattr(small.engine.runs.served["causal"].tokenizer, "encode_many", slow)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            waits = thread.submit(client.post, "/v1/embeddings", json=body)
            assert begun.wait(HANGS)
            assert client.get("/health").status_code == 200
            assert not waits.done()
            go.set()
            assert waits.result(60).status_code == 400


def test_short_texts_are_not_encoded_only_to_be_counted():
    counted = []

    def encode(texts):
        counted.append(texts)
        return [list(text) for text in texts]

    run = SimpleNamespace(tokenizer=SimpleNamespace(encode_many=encode))
    server = SimpleNamespace(settings=SimpleNamespace(max_input=1000))
    asyncio.run(ask.check_size(server, run, ["a" * 29, "b"]))
    assert counted == []
    asyncio.run(ask.check_size(server, run, ["a" * 30, "b"]))
    assert counted == [["a" * 30, "b"]]
    with pytest.raises(InputError, match="1,001 tokens in 1 texts; at most 1,000"):
        asyncio.run(ask.check_size(server, run, ["a" * 1001]))


def test_a_damaged_run_and_one_without_memory_are_unavailable_and_others_go_on(homes, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(homes["causal"], damaged)
    for path in (damaged / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    served = named([str(damaged), str(homes["masked"]), str(homes["hybrid"])])
    sizes = [run.bytes for run in served.values()]
    runs = Runs(served, Limits(slots=999, piece=16, memory=max(sizes)))
    with Running(Engine(runs)) as server, httpx.Client(base_url=server.url, timeout=HANGS) as client:
        assert client.post("/v1/completions", json={"model": "damaged", "prompt": "a", "stream": True}).status_code == 503
        for model in ("masked", "hybrid"):
            answer = client.post("/v1/embeddings", json={"model": model, "input": "the king"})
            expected = 200 if model == "masked" else 503  # so many slots do not fit
            assert answer.status_code == expected, answer.text
        runs.limits = Limits(slots=2, piece=16, memory=sum(sizes) - 1_000, prefix_cache=500)
        for model in ("masked", "hybrid", "masked"):
            assert client.post("/v1/embeddings", json={"model": model, "input": "the king"}).status_code == 200
            assert sum(one.bytes for one in runs.loaded.values()) <= runs.limits.memory
            if (pool := runs.loaded[model].pool) is not None:
                assert runs.loaded[model].bytes == served[model].bytes + pool.bytes + 500


def test_a_run_that_computes_is_not_unloaded_for_another(homes):
    served = named([str(homes["masked"]), f"other={homes['masked']}"])
    runs = Runs(served, Limits(memory=served["masked"].bytes * 3 // 2))
    call = Call("masked", lambda *_: runs.get("other"), [1])
    Engine(runs)._compute([call])
    assert "ask again later" in str(call.future.exception())
    assert list(runs.loaded) == ["masked"]


def test_a_client_that_goes_while_its_call_is_computed_leaves_the_engine_alive(running):
    begun, goes_on = threading.Event(), threading.Event()
    call = Call("masked", lambda model, items, between: (begun.set(), goes_on.wait(HANGS), items)[2], [1])
    running.engine.submit(call)
    assert begun.wait(HANGS)
    call.future.cancel()
    goes_on.set()
    later = Call("masked", lambda model, items, between: items, [2])
    running.engine.submit(later)
    assert later.future.result(60) == [2]


def test_slots_go_on_while_many_texts_are_computed():
    between, texts = [], list(range(2 * compute.PORTION + 1))
    assert compute.in_portions(lambda some: [2 * one for one in some], texts, lambda: between.append(1)) == [
        2 * one for one in texts
    ]
    assert len(between) == 2


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


def test_sigterm_lets_running_requests_end(homes, monkeypatch):
    """The command in this process and thread, with its own handling of the signal; clients in another."""
    messages, may_step, steps = queue.Queue(), threading.Event(), slots.Pool.step
    monkeypatch.setattr(command, "log", messages.put)
    monkeypatch.setattr(slots.Pool, "step", lambda pool, n=slots.CHUNK: (may_step.wait(HANGS), steps(pool, n))[1])
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    statuses, refused = [], []

    def clients():
        try:
            while not (message := messages.get(timeout=HANGS)).startswith("serving causal at "):
                pass
            url = message.split()[-1].rstrip("/")
            body = {"model": "causal", "prompt": "the king", "max_tokens": 9, "n": 5}
            with concurrent.futures.ThreadPoolExecutor(3) as threads, httpx.Client(base_url=url, timeout=HANGS) as client:
                answers = [threads.submit(client.post, "/v1/completions", json=body | {"seed": i}) for i in range(3)]
                held = ("bothways_slots_busy", "bothways_requests_waiting")
                lines = lambda: [line.split() for line in client.get("/metrics").text.splitlines()]  # noqa: E731
                wait_for(lambda: sum(float(line[1]) for line in lines() if line[0] in held) == 15)
                os.kill(os.getpid(), signal.SIGTERM)

                def closed():
                    try:
                        httpx.get(f"{url}/health")
                    except httpx.TransportError as e:
                        refused.append(e)
                    return refused

                wait_for(closed)
                may_step.set()
                statuses.extend(a.result().status_code for a in answers)
        finally:
            may_step.set()
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        command.serve((str(homes["causal"]),), port=0, slots=SLOTS["slots"])
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert refused
    assert statuses == [200] * 3


def test_connections_send_their_answers_at_once():
    """Without Nagle's algorithm, which holds the second part of every answer back for 40 ms."""
    with listen(uvicorn.Config("", port=0)) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("argv", [["--timeout", "inf"], ["--timeout", "nan"], ["--memory", "inf"], ["--memory", "nan"]])
def test_numbers_that_are_not_finite_are_refused(argv, homes, capfd):
    assert bothways.main(["serve", str(homes["causal"]), *argv]) == 2
    assert f"{argv[0][2:]} is {argv[1]}" in capfd.readouterr().err


def test_a_key_that_is_no_text_is_refused(homes, tmp_path, capfd):
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    assert bothways.main(["serve", str(homes["causal"]), "--api-key-file", str(tmp_path / "key")]) == 2
    assert "key is not text in UTF-8" in capfd.readouterr().err
