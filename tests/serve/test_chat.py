"""An answer ends with the token that ends a turn in the run's chat template, also where a text ends with another."""

import json

import httpx
import pytest

import bothways
from bothways.data.chat import control_tokens, end_of_turn
from bothways.sample.chat import answer_prompts
from bothways.serve.engine import Engine
from bothways.serve.http import Settings
from bothways.serve.runs import Limits, Runs, named
from bothways.serve.shapes import CompletionRequest
from bothways.serve.writing import seed_of
from tests.conftest import HANGS
from tests.serve.conftest import SLOTS, Running, write_run

TURN = "[CLS]"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}[CLS]{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SEEDS = range(40)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory, tiny):
    place = tmp_path_factory.mktemp("talkers")
    homes = {kind: write_run(place / kind, tiny, kind) for kind in ("causal", "dial")}
    for home in homes.values():
        (home / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return homes


@pytest.fixture(scope="module")
def http(talkers):
    runs = Runs(named([str(home) for home in talkers.values()]), Limits(**SLOTS))
    with Running(Engine(runs, queue=64)) as server, httpx.Client(base_url=server.url, timeout=HANGS) as client:
        yield client


@pytest.mark.parametrize("kind", ["causal", "dial"])
def test_an_answer_of_the_server_is_that_of_chat(talkers, http, kind):
    run = bothways.load(talkers[kind])
    assert end_of_turn(run.tokenizer) == control_tokens(run.tokenizer)[TURN] != run.tokenizer.eos
    ended = set()
    for seed in SEEDS:
        [expected] = answer_prompts(run, ["the king?"], max_tokens=8, seed=seed)
        body = {"model": kind, "messages": [{"role": "user", "content": "the king?"}], "max_tokens": 8, "seed": seed}
        [choice] = http.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]
        assert choice["message"]["content"] == expected.text
        assert choice["finish_reason"] == ("length" if expected.stop == "max_tokens" else "stop")
        ended.add(expected.stop)
        if len(ended) == 2:
            break
    assert ended == {"eos", "max_tokens"}


def test_a_block_that_was_not_trained_is_refused_for_an_answer(http):
    body = {"model": "dial", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "block": 3}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "trained on, 4" in answer.json()["error"]["message"]


def test_null_is_the_default_and_a_large_seed_is_a_seed(http):
    body = {"model": "causal", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "seed": 5}
    expected = http.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]
    nothing = {"stream": None, "logprobs": None, "stream_options": None, "n": None, "remask": None}
    assert http.post("/v1/chat/completions", json=body | nothing).raise_for_status().json()["choices"] == expected
    body = {"model": "causal", "prompt": "a", "max_tokens": 4, "echo": None, "stream": None}
    for seed in (-1, 5_000_000_000, 2**63 - 1):
        assert http.post("/v1/completions", json=body | {"seed": seed}).status_code == 200
    assert seed_of(CompletionRequest(model="causal", seed=2**32 - 1)) == 2**32 - 1
    assert len({seed_of(CompletionRequest(model="causal", seed=seed)) for seed in (5, -5, 2**32 + 5, 2**33 + 5)}) == 4


def test_who_asks_for_no_length_gets_no_more_than_a_request_may_have(talkers):
    runs = Runs(named([str(talkers["causal"])]), Limits(**SLOTS))
    body = {"model": "causal", "messages": [{"role": "user", "content": "a"}], "n": 2, "seed": 5}
    with (
        Running(Engine(runs), Settings(max_tokens=13)) as server,
        httpx.Client(base_url=server.url, timeout=HANGS) as client,
    ):
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == 12  # 6 for each, since 7 would be 14 together
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]


def test_a_directory_may_hold_an_equals_sign(talkers, tmp_path):
    (tmp_path / "lr=0.1").symlink_to(talkers["causal"])
    assert list(named([str(tmp_path / "lr=0.1")])) == ["causal"]
    assert list(named([f"best={tmp_path / 'lr=0.1'}"])) == ["best"]
