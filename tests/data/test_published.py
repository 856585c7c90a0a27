"""Published vocabularies behind the same interface as those learned here."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers

from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from tests.convert.published import BERT_SPECIAL, byte_level, save_tokenizer, wordpiece

TEXTS = [
    "the dog  sees\n\nthe queen.",
    "na\u00efve caf\u00e9 \U0001f389 \u6f22\u5b57",
    " leading, and trailing ",
    "a\tb\r\n",
    "",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    home = tmp_path_factory.mktemp("gpt2")
    save_tokenizer("gpt2", home)
    return Tokenizer.load(home / "tokenizer.json")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Tokenizer:
    home = tmp_path_factory.mktemp("bert")
    save_tokenizer("bert", home)
    return Tokenizer.load(home)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_loses_nothing(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.byte_lengths()[ids].sum() == len(text.encode())
    assert bpe.encode_many([text, text]) == [ids, ids]


def test_offsets_are_places_in_the_text(bpe, bert):
    for tokenizer in (bpe, bert):
        found = tokenizer.encode_with_offsets("the dog, caf\u00e9")
        assert [token for token, _, _ in found] == tokenizer.encode("the dog, caf\u00e9")
        assert "".join("the dog, caf\u00e9"[b:e].strip() for _, b, e in found).startswith("thedog,caf\u00e9")
        assert found[-1][2] == len("the dog, caf\u00e9")


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> PublishedTokenizer:
    """Tokens that the model does not know: some special, some not, and the mask, as Qwen's and LLaDA's files have them."""
    home = tmp_path_factory.mktemp("added")
    save_tokenizer("gpt2", home)
    file = json.loads((home / "tokenizer.json").read_text())
    first = len(file["model"]["vocab"])
    names = ["<|im_start|>", "<|im_end|>", "<think>", "<|mask|>", "</think>"]
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file["added_tokens"] += [
        {"id": first + n, "content": name, "special": "think" not in name, **same} for n, name in enumerate(names)
    ]
    (home / "tokenizer.json").write_text(json.dumps(file))
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    (home / "tokenizer_config.json").write_text(json.dumps(roles))
    return Tokenizer.load(home)


def test_added_tokens_have_the_ids_of_the_file_whatever_stands_before_them(added):
    ids = {name: added.fast.token_to_id(name) for name in ("<think>", "</think>", "<|mask|>", "<|im_end|>")}
    a, b = added.encode("a"), added.encode("b")
    assert added.encode("a<think>b</think>") == [*a, ids["<think>"], *b, ids["</think>"]]
    assert added.encode("a[MASK]b") == [*a, added.mask, *b] == [*a, ids["<|mask|>"], *b]
    assert added.encode_many(["a[MASK]b"]) == [added.encode("a[MASK]b")]
    assert not {*added.special} & {*added.encode("a<|im_end|>b<|endoftext|>")}
    assert added.decode(added.encode("a<|im_end|>b<think>")) == "a<|im_end|>b<think>"


def test_only_where_ids_were_others_is_the_fingerprint_another(added, bpe, bert):
    def before(tokenizer) -> str:
        said = tokenizer.model + json.dumps(tokenizer.roles, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    assert [t.fingerprint == before(t) for t in (added, bpe, bert)] == [False, True, True]


def test_wordpiece_has_no_padding_and_no_truncation_of_its_own(bert):
    """sentence-transformers leaves both in tokenizer.json; how long a row is, is our business."""
    ids = bert.encode("The dog sees the queen. " * 5)
    assert len(ids) >= 30
    assert bert.pad not in ids
    assert bert.decode(ids).startswith(" the dog sees the queen. the dog")


def test_masks_and_other_special_tokens(bert, bpe):
    assert (bert.pad, bert.unk, bert.bos, bert.eos, bert.mask) == (0, 1, 2, 3, 4)
    assert bert.encode("the [MASK] sees").count(bert.mask) == 1
    assert bert.decode([bert.bos, *bert.encode("the [MASK]"), bert.eos]) == " the[MASK]"
    assert bpe.mask is None
    assert bpe.bos == bpe.eos == bpe.pad == 0
    assert bpe.decode([0, *bpe.encode("the"), 0]) == "the"
    for tokenizer in (bert, bpe):
        assert not tokenizer.byte_lengths()[tokenizer.special].any()


def test_names_of_control_tokens_in_a_text_are_only_text(bert, bpe):
    for tokenizer, name in ((bert, "[SEP]"), (bpe, "<|endoftext|>")):
        ids = tokenizer.encode(f"the {name} sees")
        assert not set(ids) & set(tokenizer.special) - {tokenizer.mask, tokenizer.unk}
        assert tokenizer.encode_many([f"the {name} sees"]) == [ids]
    assert bpe.decode(bpe.encode("the <|endoftext|> sees")) == "the <|endoftext|> sees"


def test_roberta_calls_its_mask_otherwise_and_takes_the_space_along(tmp_path):
    save_tokenizer("roberta", tmp_path)
    roberta = Tokenizer.load(tmp_path)
    assert (roberta.bos, roberta.pad, roberta.eos, roberta.unk, roberta.mask) == (0, 1, 2, 3, 4)
    assert roberta.encode("the [MASK] sees") == [*roberta.encode("the"), 4, *roberta.encode(" sees")]
    assert roberta.decode(roberta.encode("the [MASK] sees")) == "the[MASK] sees"


def test_vocabulary_tells_where_words_begin(bpe, bert):
    for tokenizer in (bpe, bert):
        vocabulary = tokenizer.vocabulary()
        ids = tokenizer.encode("see the dogs. queens.")
        begins = vocabulary.starts_word[ids]
        words = "".join(f"|{tokenizer.piece(t)}" if b else tokenizer.piece(t) for t, b in zip(ids, begins, strict=True))
        assert words.removeprefix("|").replace("| ", "|").strip() == "see|the|dogs|.|queens|."
        ends = [tokenizer.piece(t) == "." for t in ids]
        assert vocabulary.ends_sentence[ids].tolist() == ends
        assert sum(ends) == 2
        assert not set(vocabulary.ordinary) & set(tokenizer.special)
        assert len(vocabulary.special) == len(tokenizer)


def test_a_byte_that_is_part_of_a_character_is_no_word(bpe):
    whole, part = bpe.encode("\u00e9"), bpe.vocabulary()
    assert len(whole) == 2
    assert [bpe.is_byte(t) for t in whole] == [True, True]
    assert not part.starts_word[whole].any()


def test_saved_and_read_again_it_is_the_same(bert, tmp_path):
    bert.save_in(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == bert.fingerprint
    assert again.roles == bert.roles


def test_the_files_of_the_first_publications_make_the_same_tokenizers(tmp_path):
    fast = byte_level(["<|endoftext|>"])
    fast.save(str(tmp_path / "whole.json"))
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    fast.model.save(str(gpt2))
    ids = PublishedTokenizer.read(gpt2 / "tokenizer.json").encode(TEXTS[1] + TEXTS[0])
    assert ids == fast.encode(TEXTS[1] + TEXTS[0]).ids
    words = wordpiece()
    words.no_truncation(), words.no_padding()
    bert = tmp_path / "bert"
    bert.mkdir()
    ordered = sorted(words.get_vocab().items(), key=lambda item: item[1])
    (bert / "vocab.txt").write_text("\n".join(token for token, _ in ordered) + "\n")
    read = PublishedTokenizer.read(bert / "tokenizer.json")
    assert read.encode("The Dog sees") == words.encode("The Dog sees", add_special_tokens=False).ids
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert PublishedTokenizer.read(bert / "tokenizer.json").encode("The") != read.encode("The")


def test_roles_come_from_the_files_then_from_config_json(tmp_path):
    byte_level([*BERT_SPECIAL, "<go>", "<halt>"]).save(str(tmp_path / "tokenizer.json"))
    read = PublishedTokenizer.read(tmp_path / "tokenizer.json", {"cls_token_id": 5, "sep_token_id": 6})
    assert (read.bos, read.eos) == (5, 6)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": {"content": "[SEP]"}}))
    assert PublishedTokenizer.read(tmp_path / "tokenizer.json", {"cls_token_id": 5, "sep_token_id": 6}).eos == 3


def test_a_prompt_opens_as_the_vocabulary_says(tmp_path):
    """Llama's begins every text with <s>; GPT-2's with nothing."""
    fast = byte_level(["<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).opening == ()
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer.load(tmp_path)
    assert read.opening == (0,)
    assert read.encode("the") == byte_level(["<s>", "</s>"]).encode("the").ids  # once, where a prompt begins


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no vocabulary: wanted tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    byte_level(["<go>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match='which token opens.*"bos_token"'):
        Tokenizer.load(tmp_path)


def test_metaspace_and_bytes(tmp_path):
    """Llama 2's kind: spaces are U+2581, and bytes have names."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "t",
        "h",
        "e",
        "th",
        "\u2581th",
        "\u2581the",
    ]
    merges = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e")]
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer.load(tmp_path)
    text = " the he \u00e9"
    assert read.decode(read.encode(text)) == text
    assert read.byte_lengths()[read.encode(text)].tolist() == [len(p.encode()) for p in (" the", " ", "h", "e", " ")] + [
        1,
        1,
    ]
    assert np.count_nonzero([read.is_byte(t) for t in read.encode(text)]) == 2
