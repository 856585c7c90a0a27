"""Clients that people use already, and the description of the endpoints, against the server."""

import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.conftest import HANGS


@pytest.fixture(scope="module")
def client(running):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_completes_chats_streams_and_embeds(client, homes):
    import bothways

    assert {model.id for model in client.models.list()} == set(homes)
    assert client.models.retrieve("masked").id == "masked"
    whole = client.completions.create(model="causal", prompt="the king", max_tokens=8, seed=3, n=2, logprobs=2)
    pieces = client.completions.create(model="causal", prompt="the king", max_tokens=8, seed=3, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    messages = [{"role": "user", "content": "the king?"}]
    chat = {"model": "causal", "messages": messages, "max_tokens": 8, "seed": 3}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    [expected] = bothways.load(homes["causal"]).sample(["user: the king?\nme: "], max_tokens=8, seed=3)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    found = client.embeddings.create(model="masked", input=["the king", "a river"])
    np.testing.assert_allclose(found.data[1].embedding, bothways.load(homes["masked"]).embed(["a river"])[0], atol=1e-5)


def test_the_openai_client_knows_what_went_wrong(client):
    import openai

    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.BadRequestError, match="forward only"):
        client.completions.create(model="causal", prompt="a", suffix="b")


def test_langchain_answers_streams_and_embeds(running, client):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    where = {"base_url": f"{running.url}/v1", "api_key": "none", "max_retries": 0}
    chat = langchain.ChatOpenAI(model="causal", max_tokens=8, seed=3, temperature=1, **where)
    messages = [{"role": "user", "content": "the king?"}]
    expected = client.chat.completions.create(model="causal", messages=messages, max_tokens=8, seed=3)
    answer = chat.invoke("the king?")
    assert answer.content == expected.choices[0].message.content
    assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens
    assert "".join(piece.content for piece in chat.stream("the king?")) == answer.content
    written = langchain.OpenAI(model="causal", max_tokens=8, seed=3, temperature=1, **where).invoke("the king")
    assert written == client.completions.create(model="causal", prompt="the king", max_tokens=8, seed=3).choices[0].text
    # Otherwise it cuts texts by the tokens of OpenAI's own models.
    embedder = langchain.OpenAIEmbeddings(model="masked", check_embedding_ctx_length=False, **where)
    found = client.embeddings.create(model="masked", input=["a river"]).data[0].embedding
    np.testing.assert_allclose(embedder.embed_query("a river"), found, atol=1e-5)


def test_mteb_embeds(client, homes, monkeypatch):
    """Its client of OpenAI's endpoint, which counts tokens by a vocabulary that it would fetch."""
    openai_models = pytest.importorskip(
        "mteb.models.model_implementations.openai_models", reason="mteb is not installed", exc_type=ImportError
    )
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: type("Bytes", (), {"encode": staticmethod(str.encode)}))
    texts = ["the king", "a river"]
    expected = [one.embedding for one in client.embeddings.create(model="masked", input=texts).data]
    model = openai_models.OpenAIModel("masked", 100, embed_dim=len(expected[0]), client=client)
    found = model.encode([{"text": texts}], task_metadata=None, hf_split="test", hf_subset="default")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_curl(running):
    call = ["curl", "-sN", f"{running.url}/v1/completions", "-d", '{"model": "causal", "prompt": "a", "stream": true}']
    lines = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]


def test_the_description_is_true(running):
    """Bodies made from it get answers that it describes: of a run that there is, and of one that there is not."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    how = {"max_examples": 2, "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
    answered = set()

    for result in schema.get_all_operations():

        @given(case=result.ok().as_strategy())
        @settings(phases=[Phase.generate], database=None, **how)
        def holds(case):
            if isinstance(case.body, dict):
                case.body["model"] = "causal"
            # A body of the right shape may still want what this run has nothing for.
            answered.add(case.call_and_validate(timeout=HANGS, excluded_checks=[positive_data_acceptance]).status_code)

        holds()
    assert {200, 400} <= answered
