"""An answer ends with the token that ends a turn in the run's chat template, also where a text ends with another."""

import json

import httpx
import pytest

import bothways
from bothways.data.chat import control_tokens, end_of_turn
from bothways.sample.chat import answer_prompts
from bothways.serve.engine import Engine
from bothways.serve.runs import Limits, Runs, named
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
