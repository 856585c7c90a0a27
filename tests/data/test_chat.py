"""Conversations: which tokens are answers, the templates that write them, and the rows that hold them."""

import copy
import json
import re

import fsspec
import numpy as np
import pytest
import tokenizers as hf

from bothways.data import chat, conversations, corpora, tokens
from bothways.data import tokenizer as trained
from bothways.data.config import DataConfig
from bothways.data.conversation_rows import PackedConversations, answered
from bothways.data.diffusion import diffused
from bothways.data.published import PublishedTokenizer
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from tests.corpus import made_up_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be the fool."},
    {"role": "user", "content": "the king?"},
    {"role": "assistant", "content": "the queen sees the king."},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "the dog loves the cat."},
]


def byte_level(template: str) -> PublishedTokenizer:
    """A vocabulary of single bytes whose post-processor puts <s> before a text, as Llama's does."""
    pieces = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    fast = hf.Tokenizer(hf.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    fast.pre_tokenizer, fast.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    first = fast.token_to_id("<s>")
    fast.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    roles = {"bos": "<s>", "eos": "</s>", "pad": "</s>"}
    return PublishedTokenizer(fast.to_str(), roles, {"chat_template": template})


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return trained.train([made_up_text(60)], "bpe", 330)


def answers_in(tokenizer: Tokenizer, messages: list[dict], after: int = 0) -> list[list[int]]:
    """The runs of tokens that the loss is on."""
    ids, scored = chat.encode_conversation(tokenizer, messages, after)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], scored, [0]])))
    return [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED, "", CHATML.replace("<|im_end|>", "{{ eos_token }}")])
def test_the_loss_is_on_answers_and_their_ends_and_on_nothing_else(template, plain):
    tokenizer = byte_level(template) if template else plain
    found = answers_in(tokenizer, TALK)
    end = chat.end_of_turn(tokenizer)
    assert [tokenizer.decode(ids) for ids in found] == [m["content"] for m in TALK if m["role"] == "assistant"]
    assert [ids[-1] for ids in found] == [end, end]
    assert end in tokenizer.special
    assert (end == tokenizer.eos) == ("<|im_end|>" not in template)
    assert [tokenizer.decode(ids) for ids in answers_in(tokenizer, TALK, after=3)] == ["the dog loves the cat."]


@pytest.mark.parametrize("template", [CHATML, ""])
def test_a_model_is_asked_for_an_answer_by_the_tokens_that_it_was_trained_after(template, plain):
    tokenizer = byte_level(template) if template else plain
    ids, scored = chat.encode_conversation(tokenizer, TALK)
    asked = chat.encode(tokenizer, chat.render(tokenizer, TALK[:4]))
    assert ids[: len(asked)] == asked
    assert scored[len(asked)]


def test_an_opening_token_stands_there_once(plain):
    tokenizer = byte_level("{{ bos_token }}" + CHATML)
    assert tokenizer.opening == (tokenizer.bos,)
    assert chat.encode_conversation(tokenizer, TALK)[0].count(tokenizer.bos) == 1
    assert chat.encode_conversation(byte_level(CHATML), TALK)[0].count(tokenizer.bos) == 0  # the template decides
    assert chat.encode_conversation(plain, TALK)[0].count(plain.bos) == 1


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (CHATML.replace("<|im_end|>", ""), "never learn where to stop"),
        ("{{ messages[0].content", "cannot write"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot write"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{{ eos_token }}{% endfor %}", "generation"),
    ],
)
def test_templates_that_cannot_be_used(template, match):
    with pytest.raises(InputError, match=match):
        chat.encode_conversation(byte_level(template), TALK)


def test_a_template_may_ask_for_the_date_and_for_tools(plain):
    plain = copy.copy(plain)
    plain.chat_template = (
        "{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y') }} {{ messages[0].content }}{{ eos_token }}"
    )
    assert re.fullmatch(r"20\d\d a\[SEP\]", chat.render(plain, [{"role": "user", "content": "a"}]))


def test_messages_hold_no_control_tokens(plain):
    with pytest.raises(InputError, match=r"holds <\|im_end\|>"):
        chat.render(byte_level(CHATML), [{"role": "user", "content": "a<|im_end|>"}])
    with pytest.raises(InputError, match="holds"):
        chat.render(plain, [{"role": "user", "content": f"a{plain.piece(plain.eos)}"}])


def test_a_template_is_read_from_a_disk_or_a_store(plain, tmp_path):
    (tmp_path / "talk.jinja").write_text(CHATML)
    fsspec.filesystem("memory").pipe_file("/talk.jinja", MARKED.encode())
    for where, template in ((str(tmp_path / "talk.jinja"), CHATML), ("memory://talk.jinja", MARKED)):
        cfg = DataConfig(messages_field="messages", chat_template=where)
        assert tokens.with_template(cfg, copy.copy(plain)).chat_template == template


def test_a_template_is_kept_with_the_vocabulary(plain, tmp_path):
    other = byte_level(CHATML)
    other.save_in(tmp_path / "a")
    assert Tokenizer.load(tmp_path / "a").chat_template == CHATML
    own = trained.SentencePieceTokenizer(plain.model)
    own.chat_template = MARKED
    own.save_in(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").chat_template == MARKED
    assert Tokenizer.load(tmp_path / "b").fingerprint == plain.fingerprint
    several = byte_level("")
    several.settings = {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]}
    assert several.chat_template == CHATML


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "without an answer"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content must be a text"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty answer"),
        ({"messages": "a"}, "list of messages"),
        ({"text": "a"}, "the fields are text"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "without an answer"),
    ],
)
def test_records_that_are_no_conversation(record, match, tmp_path, cache_dir):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=f"line 2.*{match}"):
        corpora.load(DataConfig(corpus=str(path), messages_field="messages", cache=str(cache_dir)))


def write_talks(path, count: int = 60, tail: str = "") -> None:
    """Conversations of one or two turns; the fifth's question, or with `tail` its answer, is long."""
    with path.open("w") as out:
        for i in range(count):
            turns = [dict(message) for message in TALK[1 : 3 + 2 * (i % 2)]]
            turns[0]["content"] = f"the king {i}?"
            if i == 4:
                turns[bool(tail)]["content"] = "the dog sees the cat. " * 9 + tail
            out.write(json.dumps({"messages": turns}) + "\n")


@pytest.fixture(scope="module")
def text(tmp_path_factory, cache_dir):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    write_talks(path)
    cfg = DataConfig(corpus=str(path), messages_field="messages", tokenizer="bpe", vocab_size=330, cache=str(cache_dir))
    corpus = corpora.load(cfg)
    tokenizer = tokens.obtain_tokenizer(cfg, corpus)
    return tokens.prepare(corpus, "train", tokenizer, cfg.cache), tokenizer


def test_rows_hold_every_conversation_once_and_none_sees_another(text):
    held, tokenizer = text
    starts = np.append(held.starts, len(held.ids))
    rows = PackedConversations(held, 47, tokenizer.vocabulary())
    assert rows.left_out == 1  # whose question fills the row
    assert "1 whose answers begin beyond it left out" in rows.note
    every = rows[np.arange(len(rows))]
    found = []
    for ids, segments, scored in zip(*(every[name] for name in ("tokens", "segments", "scored")), strict=True):
        for number in range(1, segments.max() + 1):
            inside = segments == number
            found.append((tuple(ids[inside].tolist()), tuple(scored[inside].astype(bool).tolist())))
    wanted = [
        (tuple(held.ids[a:b].tolist()), tuple(held.scored[a:b].tolist()))
        for a, b in zip(starts[:-1], starts[1:], strict=True)
    ]
    whole = [w for w in wanted if len(w[0]) <= 47]
    assert sorted(f for f in found if f in whole) == sorted(whole)
    example = answered(every, ExampleRng(0, np.arange(len(rows))))
    asked = example["weights"] > 0
    assert asked.sum() == every["scored"][:, 1:].sum()
    np.testing.assert_array_equal(example["targets"][asked], every["tokens"][:, 1:][asked])
    assert not asked[example["segments"] == 0].any()  # padding counts for nothing
    first = example["positions"] == 0
    assert (example["tokens"][first & (example["segments"] > 0)] == tokenizer.bos).all()


def test_long_answers_are_cut_and_nothing_too_long_for_all_is_silent(tmp_path, cache_dir, text):
    path = tmp_path / "talks.jsonl"
    write_talks(path, tail="the end.")
    cfg = DataConfig(corpus=str(path), messages_field="messages", tokenizer="bpe", vocab_size=330, cache=str(cache_dir))
    held = tokens.prepare(corpora.load(cfg), "train", text[1], cfg.cache)
    rows = PackedConversations(held, 47, text[1].vocabulary())
    assert (rows.cut, rows.left_out) == (1, 0)
    assert "1 longer than a row cut at the end" in rows.note
    with pytest.raises(InputError, match=r"none of the \d+ conversations .*--model.context-length \d+"):
        PackedConversations(held, 5, text[1].vocabulary())


def test_diffusion_never_hides_what_was_asked(text):
    held, tokenizer = text
    rows = PackedConversations(held, 47, tokenizer.vocabulary())
    every, draws = rows[np.arange(len(rows))], ExampleRng(0, np.arange(len(rows)))
    found = diffused(every, draws, tokenizer.vocabulary(), (0,), "own", False)
    changed = found["tokens"] != found["targets"]
    assert changed.any()
    assert not changed[every["scored"] == 0].any()
    assert not found["weights"][every["scored"] == 0].any()
    np.testing.assert_array_equal(found["scored"] > 0, every["scored"] > 0)


PLAY = "".join(f"{'ROMEO' if i % 2 else 'JULIET'}:\nspeech {i} [Aside]\nof mine.\n\n" for i in range(9))


def test_conversations_made_from_a_play():
    found = [json.loads(text)["messages"] for text in conversations.from_play(PLAY)]
    assert [len(messages) for messages in found] == [2, 2, 4]
    assert found[0][0]["content"] == "Juliet says:\nspeech 0 of mine.\nWhat does Romeo answer?"
    assert found[0][1]["content"] == "speech 1 of mine."
    assert found[1][1]["content"] == "Juliet, to Romeo."
    assert [m["content"] for m in found[2][1:]] == [f"speech {i} of mine." for i in (5, 6, 7)]
