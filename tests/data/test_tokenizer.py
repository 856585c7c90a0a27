"""Tokenizers: nothing is lost, training is reproducible, and what cannot work is said."""

import io
import re

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import tokenizer as tokenizers
from bothways.data.tokenizer import MASK, Tokenizer
from bothways.errors import InputError

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n\n  and runs away, again and again\n",
    "once upon a time there was a small model that read both ways\n",
    "caf\u00e9 na\u00efve \u0416\u0443\u043a 12 345\n",
] * 8
KINDS = ("unigram", "bpe", "char")

# Anything but sentencepiece's own sign for a space, and the pieces in which tokenizers lose something.
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30)
fragments = st.sampled_from(
    [
        *(
            " ",
            "   ",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            "the",
            " fox",
            "[PAD]",
            "[CLS]",
            "[UNK]",
            "[MASK",
            "<unk>",
            "<s>",
            "<0x41>",
        ),
        *(
            "\u00e9",
            "e\u0301",
            "\U0001f389",
            "\U0001f469\u200d\U0001f680",
            "\x00",
            "\ufeff",
            "\ufffd",
            "\u00a0",
            "\u3000",
            "\u2581",
        ),
    ]
)
texts = st.lists(fragments | anything, max_size=8).map("".join)
HYPOTHESIS = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: tokenizers.train(TEXTS, kind, 310) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@HYPOTHESIS
def test_any_text_comes_back_unchanged(trained, kind, text):
    assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "  two leading", "two trailing  ", "\n\n\n", " \n ", "a    b", "\U0001f600\U0001f44d\U0001f3fd", "\x00"],
)
def test_spaces_newlines_and_emoji_come_back_unchanged(trained, kind, text):
    assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts.filter(lambda text: MASK not in text))
@HYPOTHESIS
def test_byte_lengths_add_up_to_the_bytes_of_the_text(trained, kind, text):
    ids = trained[kind].encode(text)
    assert trained[kind].byte_lengths()[np.array(ids, int)].sum() == len(text.encode())


def test_special_tokens_stand_for_no_bytes(trained):
    for tokenizer in trained.values():
        lengths = tokenizer.byte_lengths()
        assert not lengths[tokenizer.special].any()
        assert (np.delete(lengths, tokenizer.special) > 0).all()


def test_special_ids_are_those_of_the_pieces(trained):
    for tokenizer in trained.values():
        names = [tokenizer.piece(i) for i in (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.mask)]
        assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert tokenizer.special == [0, 1, 2, 3, tokenizer.mask]


def test_mask_in_a_text_is_the_mask_token(trained):
    for tokenizer in trained.values():
        before, after = tokenizer.encode("the lazy "), tokenizer.encode(" dog")
        assert tokenizer.encode("the lazy [MASK] dog") == [*before, tokenizer.mask, *after]
        assert tokenizer.encode("[MASK][MASK]") == [tokenizer.mask] * 2
        assert tokenizer.decode([*before, tokenizer.mask, *after]) == "the lazy [MASK] dog"


def test_names_of_other_special_tokens_in_a_text_are_only_text(trained):
    for tokenizer in trained.values():
        assert not set(tokenizer.encode("[PAD] [UNK] [CLS] [SEP]")) & set(tokenizer.special)


def test_pad_bos_and_eos_say_nothing(trained):
    for tokenizer in trained.values():
        ids = [tokenizer.bos, *tokenizer.encode(" fox\n"), tokenizer.eos, tokenizer.pad]
        assert tokenizer.decode(ids) == " fox\n"


def test_many_texts_at_once_are_encoded_as_one_by_one(trained):
    for tokenizer in trained.values():
        for texts in (TEXTS[:5], [*TEXTS[:5], "", "\u2581a"]):
            ids = [tokenizer.encode(text) for text in texts]
            assert tokenizer.encode_many(texts) == ids
            found = tokenizer.encode_arrays(texts)
            assert [each.tolist() for each in found] == ids
            assert {each.dtype for each in found} == {np.dtype(np.int32)}


def test_a_newline_is_one_token_and_never_part_of_another(trained):
    for tokenizer in trained.values():
        newline = tokenizer.encode("\n")
        assert len(newline) == 1
        assert [i for i in range(len(tokenizer)) if "\n" in tokenizer.piece(i)] == newline


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_reproducible_byte_for_byte(trained, kind):
    first = trained[kind]
    again = tokenizers.train(iter(TEXTS), kind, 310)
    assert again.model == first.model
    assert again.fingerprint == first.fingerprint
    assert tokenizers.train([*TEXTS, "zebra zebra zebra\n"], kind, 310).fingerprint != first.fingerprint


def test_a_char_vocabulary_holds_the_characters_of_its_text(trained):
    tokenizer = trained["char"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("fox caf\u00e9\n")] == list("fox caf\u00e9\n")
    unknown = tokenizer.encode("\U0001f389")
    assert [tokenizer.piece(i) for i in unknown] == ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@HYPOTHESIS
def test_offsets_say_where_in_the_text_each_token_is(trained, kind, text):
    tokenizer = trained[kind]
    found = tokenizer.encode_with_offsets(text)
    assert [token for token, _, _ in found] == tokenizer.encode(text)
    end = 0
    for token, first, last in found:
        whole = not tokenizer.sp.is_byte(token)
        assert first == end if whole else first in (end - 1, end)
        assert text[first:last] == tokenizer.decode([token]) if whole else last == first + 1
        end = last
    assert end == len(text)


def test_a_vocabulary_is_learned_from_the_beginning_only(monkeypatch):
    monkeypatch.setattr(tokenizers, "TRAINING_BYTES", 10)
    assert list(tokenizers.lines(["abc\n\ndéf", "gh\nij\nk"])) == ["abc", "déf", "gh"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_text_of_one_long_line_gives_a_vocabulary(kind):
    line = " ".join(f"word{i % 97} of" for i in range(110_000))
    assert len(line) > 1_000_000
    assert len(tokenizers.train([line], kind, 280)) == 280
    assert "".join(tokenizers.parts_of(line)) == line
    assert max(map(len, tokenizers.parts_of("x" * 10_000))) == tokenizers.LONGEST_LINE


def test_a_saved_tokenizer_is_the_same_again(trained, tmp_path):
    trained["bpe"].save(tmp_path / "new" / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "new" / "tokenizer.model")
    assert loaded.fingerprint == trained["bpe"].fingerprint
    assert loaded.encode(TEXTS[0]) == trained["bpe"].encode(TEXTS[0])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_large_a_vocabulary_is_refused_with_the_largest_possible(kind):
    with pytest.raises(InputError, match=r"vocab_size is 5000, .* at most \d+ ") as refused:
        tokenizers.train(TEXTS, kind, 5000)
    most = int(re.search(r"at most (\d+)", str(refused.value))[1])
    assert f"--data.vocab-size {most}" in str(refused.value)
    assert len(tokenizers.train(TEXTS, kind, most)) == most
    with pytest.raises(InputError, match=f"at most {most} "):
        tokenizers.train(TEXTS, kind, most + 1)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_small_a_vocabulary_is_refused_with_the_smallest_possible(kind):
    with pytest.raises(InputError, match=r"vocab_size is 100, too small .*\(\d+\)") as refused:
        tokenizers.train(TEXTS, kind, 100)
    least = int(re.search(r"\((\d+)\)", str(refused.value))[1])
    assert len(tokenizers.train(TEXTS, kind, least)) == least
    with pytest.raises(InputError, match="too small"):
        tokenizers.train(TEXTS, kind, least - 1)
    with pytest.raises(InputError, match="vocab_size is 100, too small"):
        tokenizers.train(TEXTS, "char", 100)


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no bpe vocabulary of 300 pieces"):
        tokenizers.train(["", "\n\n"], "bpe", 300)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*absent\.model: No such file"):
        Tokenizer.load(tmp_path / "absent.model")


@pytest.mark.parametrize("cut", [0, 7, 500])
def test_a_file_that_is_no_model_is_refused(trained, tmp_path, cut):
    path = tmp_path / "x.model"
    path.write_bytes(trained["bpe"].model[:cut] or b"just some text\n")
    with pytest.raises(InputError, match=r"x\.model is not a sentencepiece model"):
        Tokenizer.load(path)


@pytest.mark.parametrize("specials", [{}, {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}])
def test_a_model_without_the_special_tokens_is_refused(tmp_path, specials):
    model = io.BytesIO()
    names = {"pad_piece": "[PAD]", "unk_piece": "[UNK]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"} if specials else {}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=50, minloglevel=2, **specials, **names
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"does not begin with \[PAD\] \[UNK\] \[CLS\] \[SEP\] and hold \[MASK\]"):
        Tokenizer.load(path)
