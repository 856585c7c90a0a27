"""Each endpoint, over a real port, beside what the run gives without a server."""

import base64
import concurrent.futures
import json
import threading
import time
from http.client import HTTPConnection

import numpy as np
import pytest

import bothways
from tests.conftest import HANGS

PROMPT = "the king "


@pytest.fixture(scope="module")
def causal(homes):
    return bothways.load(homes["causal"])


def complete(http, **fields):
    answer = http.post("/v1/completions", json={"model": "causal", "prompt": PROMPT, "max_tokens": 12} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_seed_writes_what_the_run_writes_alone_or_among_fifty(http, causal):
    alone = complete(http, seed=7, n=2)
    expected = causal.sample([PROMPT], max_tokens=12, num=2, seed=7)
    assert [c["text"] for c in alone["choices"]] == [s.text for s in expected]
    assert alone["usage"]["completion_tokens"] == sum(s.tokens for s in expected) - sum(s.stop == "eos" for s in expected)

    def one(i: int) -> str:
        if i == 23:
            return complete(http, seed=7)["choices"][0]["text"]
        text = ["", "a", PROMPT * (i % 3 + 1)][i % 3]
        return complete(http, prompt=text, seed=i, max_tokens=i % 20 + 1, top_k=i % 4, temperature=i % 3)["id"]

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(one, range(50)))
    assert found[23] == alone["choices"][0]["text"]
    assert len(set(found)) == 50


def test_a_stream_says_what_the_whole_answer_says(http):
    body = {"model": "causal", "prompt": [PROMPT, "a"], "max_tokens": 12, "seed": 5, "n": 2, "stop": ["zz"]}
    whole = complete(http, **body)
    texts, finished, usage = [""] * 4, {}, None
    with http.stream(
        "POST", "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
    ) as s:
        lines = [line for line in s.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        event = json.loads(line.removeprefix("data: "))
        usage = event.get("usage", usage)
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                finished[choice["index"]] = choice["finish_reason"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert finished == {c["index"]: c["finish_reason"] for c in whole["choices"]}
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    figures = dict(line.split() for line in http.get("/metrics").text.splitlines() if "seconds_count " in line)
    assert float(figures["bothways_time_to_first_token_seconds_count"]) >= 2
    assert float(figures["bothways_time_per_token_seconds_count"]) >= 4


def test_a_stop_string_ends_a_text_before_it(http):
    whole = complete(http, seed=1, max_tokens=20)["choices"][0]["text"]
    stop = whole[6:9]
    cut = complete(http, seed=1, max_tokens=20, stop=stop)["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_long_prompts_go_in_pieces_and_their_beginnings_are_kept(http, causal, running):
    prompt = "the ship fears the king in the river. the king"
    first = complete(http, prompt=prompt, temperature=0, max_tokens=6)
    again = complete(http, prompt=prompt, temperature=0, max_tokens=6)
    assert first["choices"][0]["text"] == causal.sample([prompt], max_tokens=6, greedy=True)[0].text
    assert again["choices"] == first["choices"]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (first, again)]
    assert cached == [0, running.engine.runs.loaded["causal"].pool.piece]


def test_log_probabilities_sum_to_the_score_of_the_text(http, causal):
    answer = complete(http, seed=7, n=2, logprobs=2)
    expected = causal.sample([PROMPT], max_tokens=12, num=2, seed=7)
    for choice, sample in zip(answer["choices"], expected, strict=True):
        found = choice["logprobs"]
        ended = sample.tokens - len(found["tokens"])
        assert ended or sum(found["token_logprobs"]) == pytest.approx(sample.logprob, abs=0.01)
        for logprob, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
            assert len(top) <= 2
            assert logprob <= max(top.values()) + 1e-5
    assert sum(len(c["logprobs"]["tokens"]) for c in answer["choices"]) == answer["usage"]["completion_tokens"]


def test_probabilities_of_tokens_multiply_to_the_score(http, homes):
    text, hybrid = "the king fears the river", bothways.load(homes["hybrid"])
    found = {}
    for direction, rule in (("forward", "causal"), ("both", "pll")):
        answer = http.post("/tokens", json={"model": "hybrid", "text": text, "direction": direction, "top": 3}).json()
        [score] = hybrid.score([text], rule=rule)
        assert answer["direction"] == direction
        assert "".join(t["text"] for t in answer["tokens"]) == text
        assert np.log([t["p"] for t in answer["tokens"]]).sum() == pytest.approx(score.logprob, abs=0.1)
        found[direction] = answer["tokens"]
    assert found["forward"] != found["both"]


def test_vectors_are_those_of_the_run_in_either_encoding(http, causal):
    texts = ["the king", "a river", "the ship fears the king"]
    plain = http.post("/v1/embeddings", json={"model": "causal", "input": texts}).json()
    coded = http.post("/v1/embeddings", json={"model": "causal", "input": texts, "encoding_format": "base64"}).json()
    expected = causal.embed(texts)
    np.testing.assert_allclose([d["embedding"] for d in plain["data"]], expected, atol=1e-5)
    read = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in coded["data"]]
    np.testing.assert_allclose(read, expected, atol=1e-5)
    ids = causal.tokenizer.encode(texts[0])
    by_ids = http.post("/v1/embeddings", json={"model": "causal", "input": ids}).json()
    np.testing.assert_allclose(by_ids["data"][0]["embedding"], expected[0], atol=1e-5)


def test_documents_are_ranked_by_their_vectors(http):
    documents = ["a river", "the king", "the ship"]
    body = {"model": "masked", "query": "the king", "documents": documents, "top_n": 2}
    found = http.post("/rerank", json=body).json()["results"]
    assert len(found) == 2
    assert found[0]["index"] == 1
    assert found[0]["relevance_score"] == pytest.approx(1, abs=1e-3)
    assert found[0]["document"] == {"text": "the king"}


def test_masks_are_filled_and_gaps_too(http, homes):
    masked = bothways.load(homes["masked"])
    body = {"model": "masked", "input": ["the [MASK] fears", "the king [MASK] [MASK]"], "top": 3, "steps": 2}
    found = http.post("/fill", json=body).json()["data"]
    assert [f["filled"] for f in found] == [f.filled for f in masked.fill(body["input"], top=3, steps=2)]
    gap = complete(http, model="hybrid", prompt="the king", suffix=" the river", max_tokens=3, n=2, seed=1)
    assert len({c["text"] for c in gap["choices"]}) == 2
    assert gap["usage"]["completion_tokens"] == 6


def test_blocks_are_written_and_streamed(http, homes):
    options = {"block": 4, "steps": 2}
    [expected] = bothways.load(homes["masked"]).sample([PROMPT], max_tokens=12, seed=9, **options)
    body = {"model": "masked", "prompt": PROMPT, "max_tokens": 12, "seed": 9} | options
    assert complete(http, **body)["choices"][0]["text"] == expected.text
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as s:
        events = [json.loads(line[6:]) for line in s.iter_lines() if line.startswith("data: {")]
    assert "".join(e["choices"][0]["text"] for e in events) == expected.text
    assert len(events) > 2


def test_blocks_of_several_requests_are_written_together_each_as_if_alone(http, running, monkeypatch):
    """Requests that differ in prompt, seed and length, behind one that is being written."""
    wanted = [(PROMPT, 8, 3), ("a ship", 5, 4), (PROMPT, 12, 5)]

    def one(prompt: str, most: int, seed: int) -> str:
        body = {"model": "dial", "prompt": prompt, "max_tokens": most, "seed": seed, "block": 4}
        return complete(http, **body)["choices"][0]["text"]

    alone = [one(*some) for some in wanted]
    loaded, sizes, begun = running.engine.runs.loaded["dial"].model, [], threading.Event()
    sample = loaded.sample

    def when_others_wait(prompts, **named):
        sizes.append(len(prompts))
        begun.set()
        while len(sizes) == 1 and running.engine.waiting < len(wanted):
            time.sleep(0.01)
        return sample(prompts, **named)

    monkeypatch.setattr(loaded, "sample", when_others_wait)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(one, *wanted[0])
        assert begun.wait(HANGS)
        together = list(pool.map(lambda some: one(*some), wanted))
        assert first.result() == alone[0]
    assert together == alone
    assert sizes == [1, 3]


def test_an_encoder_decoder_writes_for_a_source(http, homes):
    [expected] = bothways.load(homes["pairs"]).sample([PROMPT], max_tokens=7, seed=2)
    assert complete(http, model="pairs", seed=2, max_tokens=7)["choices"][0]["text"] == expected.text


REFUSED = [
    ("/v1/completions", {"model": "nobody", "prompt": "a"}, 404, "causal"),
    ("/v1/completions", {"model": "causal", "suffix": "a"}, 400, "forward only"),
    ("/v1/completions", {"model": "causal", "prompt": "a", "max_tokens": 48}, 400, "48 tokens"),
    ("/v1/completions", {"model": "causal", "prompt": "a", "block": 4}, 400, "blocks"),
    ("/v1/completions", {"model": "causal", "prompt": "a", "presence_penalty": 1}, 400, "presence_penalty"),
    ("/v1/completions", {"model": "masked", "prompt": "a", "logprobs": 1}, 400, "logprobs"),
    ("/v1/chat/completions", {"model": "masked", "messages": [{"role": "user", "content": "a"}]}, 400, "both ways"),
    ("/v1/chat/completions", {"model": "hybrid", "messages": [{"role": "user", "content": "a"}]}, 400, "template"),
    ("/v1/embeddings", {"model": "causal", "input": ["a", 3]}, 400, "texts only"),
    ("/v1/embeddings", {"model": "causal", "input": "the king " * 60}, 400, "context"),
    ("/score", {"model": "causal", "input": "a", "rule": "pll"}, 400, "causal"),
    ("/fill", {"model": "masked", "input": "no mask"}, 400, "[MASK]"),
    ("/classify", {"model": "causal", "input": "a"}, 400, "finetune"),
    ("/tokens", {"model": "causal", "text": "a", "direction": "both"}, 400, "both ways"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), REFUSED)
def test_what_a_run_cannot_do_is_refused_with_the_reason(http, path, body, status, says):
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd"])
def test_a_path_that_climbs_is_not_found(running, path):
    """As it is on the wire: httpx would take the dots out."""
    for method in ("GET", "POST"):
        connection = HTTPConnection("127.0.0.1", running.port, timeout=HANGS)
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == 404
        assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
        connection.close()


def test_one_bad_text_does_not_spoil_those_computed_with_it(http):
    bodies = [{"model": "causal", "input": text} for text in ("a", "the king " * 60, "the king")]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: http.post("/v1/embeddings", json=body), bodies))
    assert [a.status_code for a in answers] == [200, 400, 200]
