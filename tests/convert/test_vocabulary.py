"""Vocabularies in and out: the ids that `transformers` and `tokenizers` give, on odd texts too."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from bothways.convert import files, gguf_vocabulary
from bothways.convert.run import import_run
from bothways.convert.vocabulary import save_vocabulary
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import SentencePieceTokenizer, Tokenizer, train
from bothways.errors import InputError
from tests.convert.published import byte_level, change, checkpoint, quiet, refused, wordpiece
from tests.convert.test_import import write_gguf
from tests.corpus import made_up_text

ODD = [
    "\u00c9lan caf\u00e9, na\u00efve",
    "\u6f22\u5b57 and kana \u304b\u306a",
    "the dog<|speaker|> sees <|speaker|>",
    " two  spaces\t\ttabs\r\n\n lines ",
    "\U0001f389\u200d\U0001f525 e\u0301 \u1e9e\u00df \u00a0",
    "The [MASK] SEES",
    "",
    " ",
]


@pytest.fixture(scope="module", autouse=True)
def no_transformers_logits():
    """Logits are compared in test_parity.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bothways.convert.check.transformers_logits", lambda *_: (None, ""))
        yield


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def own(request) -> SentencePieceTokenizer:
    return train([made_up_text(60) + "<0x41> [page]\n"], request.param, 320)


def drawn_texts(count: int = 500) -> list[str]:
    """Texts of parts that a vocabulary may trip over, put together at random."""
    rng = random.Random(0)
    parts = [*"theding.AZ[]<>", "  ", " ", "\n", "\r", "\t", "\u00e9", "\u6f22", "\U0001f389", "\x00", "[MASK]", "\u2581"]
    parts += ["<0x41>", "<0x0A>", "the dog", "KING:", "[PAD", "[page]", "\u0301", "\ud7ff", "queen in the castle."]
    return ["".join(rng.choices(parts, k=rng.randrange(20))) for _ in range(count)] + [made_up_text(60)]


def test_a_vocabulary_trained_here_leaves_with_the_same_ids_for_every_text(own, tmp_path):
    save_vocabulary(own, tmp_path, "gpt")
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert fast.get_vocab_size() == len(own)
    for text in drawn_texts():
        if "[PAD]" in text:
            continue  # which is that token, as in every published vocabulary
        ids = own.encode(text)
        assert fast.encode(text).ids == ids, text
        assert fast.decode(ids) == text, text


@pytest.mark.parametrize("family", ["gpt", "bert", "seq2seq"])
def test_autotokenizer_opens_it_and_puts_around_a_text_what_the_family_has(own, family, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_vocabulary(own, tmp_path, family)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = own.encode(ODD[3])
    around = {"gpt": ids, "bert": [own.bos, *ids, own.eos], "seq2seq": [*ids, own.eos]}[family]
    assert theirs(ODD[3]).input_ids == around
    assert theirs.decode(around, skip_special_tokens=True) == ODD[3]
    if family == "bert":
        pair = theirs("the", "dog")
        a, b = own.encode("the"), own.encode("dog")
        assert pair.input_ids == [own.bos, *a, own.eos, *b, own.eos]
        assert pair.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert files._tokenizer(tmp_path, {}).fingerprint == own.fingerprint  # the import reads tokenizer.model


def vocabulary_directory(home: Path, kind: str, settings: dict, added: dict[str, int]) -> Path:
    """The files of a first publication, without tokenizer.json."""
    home.mkdir()
    if kind == "vocab.txt":
        ordered = sorted(wordpiece(150).get_vocab().items(), key=lambda item: item[1])
        lines = [token for token, _ in ordered] + ["\u00e9", "##\u00e9", "\u6f22", "##\u6f22", "caf", "T", "##E", "S"]
        (home / "vocab.txt").write_text("\n".join(lines) + "\n")
    else:
        byte_level(["<|endoftext|>"] if kind == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).model.save(
            str(home)
        )
    model = {"vocab.txt": "bert", "gpt2": "gpt2", "roberta": "roberta"}[kind]
    (home / "config.json").write_text(json.dumps({"model_type": model}))
    if settings:
        (home / "tokenizer_config.json").write_text(json.dumps(settings))
    if added:
        (home / "added_tokens.json").write_text(json.dumps(added))
    return home


MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False} | {
    "single_word": False,
    "special": True,
}
BERT_CLASS = {"tokenizer_class": "BertTokenizer"}


@pytest.mark.parametrize(
    ("kind", "settings", "added"),
    [
        ("vocab.txt", BERT_CLASS | {"do_lower_case": True}, {}),
        ("vocab.txt", BERT_CLASS | {"do_lower_case": False}, {}),
        ("vocab.txt", BERT_CLASS | {"do_lower_case": True, "strip_accents": False}, {}),
        ("vocab.txt", BERT_CLASS | {"do_lower_case": False, "strip_accents": True}, {}),
        ("vocab.txt", BERT_CLASS | {"do_lower_case": True, "tokenize_chinese_chars": False}, {}),
        ("vocab.txt", BERT_CLASS | {"do_lower_case": True}, {"<|speaker|>": 0}),
        ("gpt2", {}, {}),
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer"}, {"<|speaker|>": 0, "<|pad|>": 1}),
        ("roberta", {"tokenizer_class": "RobertaTokenizer", "mask_token": MASK}, {}),
    ],
)
def test_the_first_publications_files_give_transformers_ids_in_and_out(kind, settings, added, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = len(PublishedTokenizer.read(vocabulary_directory(tmp_path / "x", kind, {}, {}) / "tokenizer.json"))
    home = vocabulary_directory(tmp_path / "home", kind, settings, {t: size + i for t, i in added.items()})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(home), PublishedTokenizer.read(home / "tokenizer.json")
    save_vocabulary(ours, tmp_path / "out", "bert" if kind == "vocab.txt" else "gpt")
    (tmp_path / "out" / "config.json").write_bytes((home / "config.json").read_bytes())
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    mask = theirs.mask_token or "[MASK]"
    for text in ODD:
        assert ours.encode(text) == theirs(text.replace("[MASK]", mask), add_special_tokens=False).input_ids, text
        assert dict(back(text, "the")) == dict(theirs(text, "the"))
    assert len(ours) == size + len(added)
    assert (ours.unk in ours.encode("\U0001f389")) == (kind == "vocab.txt")


CUT_OTHERWISE = [*ODD[:5], "DON'T don't 12345 1 2", "a\n\n  b\r\n c", "(the) the's +dog e\u0301\u0327 \u212b"]
ALIKE = "GPT2 Roberta Bart Longformer LED Mvp Blenderbot Whisper CodeGen Deberta Luke"
QWEN2 = ["Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer"]  # Dream's is Qwen 2's, in a file beside its weights


@pytest.mark.parametrize("name", [*QWEN2, *(f"{kind}Tokenizer" for kind in ALIKE.split()), "BartTokenizerFast"])
def test_the_first_publications_files_are_cut_as_their_class_cuts(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "add_prefix_space": False}
    home = vocabulary_directory(tmp_path / "home", "gpt2", settings, {})
    if name in QWEN2:
        settings |= {"bos_token": None, "pad_token": "<|im_end|>"}
        settings |= {"added_tokens_decoder": {"307": {"content": "<|im_end|>", "special": True}}}
        (home / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = PublishedTokenizer.read(home / "tokenizer.json")
    theirs = getattr(transformers, QWEN2[0] if name in QWEN2 else name).from_pretrained(home)
    for text in CUT_OTHERWISE:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert len(ours) == (308 if name in QWEN2 else 307)


@pytest.mark.parametrize("name", ["GPTNeoXTokenizerFast", "CTRLTokenizer", "Qwen3_5Tokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_may_cut_otherwise_is_refused(name, tmp_path):
    home = vocabulary_directory(tmp_path / "home", "gpt2", {"tokenizer_class": name}, {})
    with pytest.raises(InputError, match=rf"a {name}, which may cut texts otherwise than .*save_pretrained\(DIR\)"):
        PublishedTokenizer.read(home / "tokenizer.json")


def test_added_tokens_must_follow_the_vocabulary(tmp_path):
    home = vocabulary_directory(tmp_path / "home", "gpt2", {}, {"<|speaker|>": 400})
    with pytest.raises(ValueError, match=r"'<\|speaker\|>' was added as number 400, and comes to stand at 307"):
        PublishedTokenizer.read(home / "tokenizer.json")


def test_settings_and_chat_templates_survive(tmp_path):
    source = checkpoint("llama", tmp_path / "source")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 77, "auto_map": {"AutoTokenizer": "x.Y"}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ messages }}\u00e9")
    (source / "generation_config.json").write_text('{"top_k": 7}')
    import_run(str(source), tmp_path / "run", "shakespeare", quiet)
    tokenizer = Tokenizer.load(tmp_path / "run")
    assert tokenizer.settings["chat_template"] == "{{ messages }}\u00e9"
    assert tokenizer.settings["model_max_length"] == 77
    assert "auto_map" not in (tmp_path / "run" / "tokenizer_config.json").read_text()  # it names code
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text()) == {"top_k": 7}


@pytest.mark.parametrize(("says", "opening"), [({}, ()), ({"add_bos_token": True}, (0,)), ({"add_bos_token": False}, ())])
def test_what_opens_a_prompt_is_what_the_settings_say(says, opening, tmp_path):
    byte_level(["<s>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    assert Tokenizer.load(tmp_path).opening == opening


def test_a_token_that_was_added_without_a_vector_is_left_out(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    fast = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    rows = fast.get_vocab_size()
    fast.add_special_tokens(["[PAD]"])
    fast.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "eos_token": "<|endoftext|>"}))
    said = []
    import_run(str(source), tmp_path / "run", "shakespeare", said.append)
    assert "no vector for them: [PAD]" in said[0]
    tokenizer = Tokenizer.load(tmp_path / "run")
    assert (len(tokenizer), tokenizer.pad) == (rows, tokenizer.eos)
    assert max(tokenizer.encode("a [PAD] b")) < rows


def gguf_tokenizer(tmp_path: Path, **said) -> PublishedTokenizer:
    fast = json.loads(byte_level(["<s>", "</s>"]).to_str())["model"]
    names = [*sorted(fast["vocab"], key=fast["vocab"].get), "<think>", "thequeen"]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3 if n in ("<s>", "</s>") else 4 if n == "<think>" else 1 for n in names],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in fast["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return gguf_vocabulary.read(found | {f"tokenizer.ggml.{k}": v for k, v in said.items()}, tmp_path)


def test_gguf_vocabularies_keep_their_tokens_types_and_rules(tmp_path):
    plain, llama3 = gguf_tokenizer(tmp_path, pre="default"), gguf_tokenizer(tmp_path, pre="llama-bpe")
    think, whole = len(plain) - 2, len(plain) - 1
    for tokenizer in (plain, llama3):
        assert tokenizer.encode("a<think>b")[1] == think
        assert tokenizer.decode([think]) == "<think>"
    assert whole not in plain.encode("thequeen")
    assert llama3.encode("thequeen") == [whole]  # though no merge makes it
    assert (plain.opening, llama3.opening) == ((), (0,))
    assert gguf_tokenizer(tmp_path, pre="llama-bpe", add_bos_token=False).opening == ()


def test_names_without_the_bodys_prefix_may_have_a_head_beside_them(tmp_path):
    for family in ("gpt2", "llama"):
        source = checkpoint(family, tmp_path / family, tie_word_embeddings=False)
        prefix = {"gpt2": "transformer.", "llama": "model."}[family]
        import_run(str(source), tmp_path / f"{family}-a", "shakespeare", quiet)
        tensors = load_file(source / "model.safetensors")
        assert "lm_head.weight" in tensors
        save_file({n.removeprefix(prefix): t for n, t in tensors.items()}, source / "model.safetensors")
        import_run(str(source), tmp_path / f"{family}-b", "shakespeare", quiet)


def test_damaged_numbers_and_foreign_files_are_refused(tmp_path, capfd):
    source = checkpoint("gpt2", tmp_path / "source")
    bias = load_file(source / "model.safetensors")["transformer.h.1.mlp.c_fc.bias"]
    bias[3] = np.nan
    change(source, **{"transformer/h/1/mlp/c_fc/bias": bias})
    refused(source, tmp_path / "run", capfd, "not all finite numbers (NaN or infinite): transformer.h.1.mlp.c_fc.bias")
    (source / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../secret.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "run", capfd, "names files outside its directory: ../secret.safetensors")


def test_a_gguf_file_of_llama_3_says_nothing_of_bos_and_opens_with_it(tmp_path):
    source = checkpoint("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "x.gguf", add_bos=False)
    assert files.read(str(tmp_path / "x.gguf")).tokenizer.opening == ()
