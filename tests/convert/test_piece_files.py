"""Vocabularies of Marian and M2M-100 as their tokenizers save them: the ids of `transformers`, in and out."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

import bothways
from bothways.convert.run import export_run, import_run
from bothways.data import corpora
from bothways.data.config import DataConfig
from bothways.data.piece_files import M2MPieces, MarianPieces
from bothways.data.tokenizer import Tokenizer
from bothways.data.tokens import prepare
from tests.convert.cases import SIDES
from tests.convert.published import refused, shuffled

torch = pytest.importorskip("torch", reason="the extra `parity` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` (torch, transformers) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

WORDS = "the dog sees king queen castle walks house Hund sieht König Schloß geht Haus über straße".split()


def model(seed: int) -> bytes:
    """A sentencepiece model as Marian's are: no padding, unknown, opening and closing first; normalising."""
    rng, made = random.Random(seed), io.BytesIO()
    texts = (" ".join(rng.choices(WORDS[seed : seed + 11], k=8)) + "." for _ in range(200))
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=made, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    return made.getvalue()


def pieces(*models: bytes) -> list[str]:
    """What vocab.json numbers: not all that the models know, and in another order."""
    sides = [spm.SentencePieceProcessor(model_proto=each) for each in models]
    return sorted({sp.id_to_piece(i) for sp in sides for i in range(3, len(sp)) if i % 7})


def save_marian(home: Path) -> None:
    files = {"source.spm": model(0), "target.spm": model(5)}
    names = ["</s>", "<unk>", ">>fra<<", *pieces(*files.values()), "<pad>"]
    home.mkdir(exist_ok=True)
    for name, content in files.items():
        (home / name).write_bytes(content)
    (home / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(names)}))
    transformers.MarianTokenizer.from_pretrained(home).save_pretrained(home)


def save_m2m(home: Path) -> None:
    home.mkdir(exist_ok=True)
    (home / "sentencepiece.bpe.model").write_bytes(model(2))
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces(model(2))]
    (home / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(names)}))
    transformers.M2M100Tokenizer.from_pretrained(home, src_lang="de", tgt_lang="fr").save_pretrained(home)


def drawn_texts(count: int = 300) -> list[str]:
    rng = random.Random(1)
    parts = [
        *WORDS,
        *"theäß.,!",
        " ",
        "  ",
        "\n",
        "\t",
        ">>fra<<",
        ">>deu<<",
        ">>",
        "__de__",
        "漢",
        "\u2581",
        "ﬁ",
        "e\u0301",
        "\u00a0",
    ]
    return ["", " ", *("".join(rng.choices([*parts, " "], k=rng.randrange(1, 16))) for _ in range(count))]


@pytest.mark.parametrize("kind", ["marian", "m2m_100"])
def test_ids_and_texts_are_those_of_transformers_on_both_sides(kind, tmp_path):
    if kind == "marian":
        save_marian(tmp_path)
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
        ours = MarianPieces.read(tmp_path / "source.spm", {"decoder_start_token_id": theirs.pad_token_id})
    else:
        save_m2m(tmp_path)
        theirs = transformers.M2M100Tokenizer.from_pretrained(tmp_path)
        ours = M2MPieces.read(tmp_path / "sentencepiece.bpe.model", {"decoder_start_token_id": theirs.eos_token_id})
    before, behind = ours.around_source()
    assert (len(before), ours.target_start[:1]) == ((0, (theirs.pad_token_id,)) if kind == "marian" else (1, (2,)))
    texts, differ = drawn_texts(), 0
    for text in texts:
        source, target = theirs(text).input_ids, theirs(text_target=text).input_ids
        assert [*before, *ours.encode(text), *behind] == source, text
        assert [*ours.target_start[1:], *ours.of_targets.encode(text), ours.eos] == target, text
        plain = [i for i in source if i not in before]
        assert ours.decode(source) == theirs.decode(plain, skip_special_tokens=True), text
        assert [i for i, _, _ in ours.encode_with_offsets(text)] == ours.encode(text), text
        differ += source[len(before) :] != target[len(ours.target_start) - 1 :]
    assert (differ > 100) == (kind == "marian")
    assert ours.encode_many(texts) == [ours.encode(text) for text in texts]
    ours.save_in(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    assert again.fingerprint == ours.fingerprint
    assert again.encode_many(texts) == ours.encode_many(texts)


def test_offsets_are_places_in_the_text(tmp_path):
    save_marian(tmp_path)
    ours, text = MarianPieces.read(tmp_path / "source.spm"), ">>fra<<der dog sees über"
    found = ours.encode_with_offsets(text)
    assert text[: found[0][2]] == ">>fra<<"
    assert "".join(text[begin:end] for _, begin, end in found) == text


@pytest.fixture(scope="module", params=["marian", "m2m_100"])
def translator(request, tmp_path_factory) -> Path:
    """A checkpoint of random numbers beside its own vocabulary."""
    home, name = tmp_path_factory.mktemp(request.param) / "source", request.param
    (save_marian if name == "marian" else save_m2m)(home)
    rows = len(json.loads((home / "vocab.json").read_text()))
    ids = {"pad_token_id": rows - 1, "eos_token_id": 0, "decoder_start_token_id": rows - 1}
    if name == "m2m_100":
        rows, ids = rows + 108, {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    ids["forced_eos_token_id"] = None
    config = getattr(transformers, {"marian": "MarianConfig", "m2m_100": "M2M100Config"}[name])(
        vocab_size=rows, **SIDES | {"max_position_embeddings": 64}, **ids
    )
    torch.manual_seed(3)
    kind = {"marian": "MarianMTModel", "m2m_100": "M2M100ForConditionalGeneration"}[name]
    getattr(transformers, kind)(config).save_pretrained(home)
    shuffled(home)
    return home


def test_a_translator_comes_in_with_its_own_vocabulary_writes_what_transformers_does_and_leaves(translator, tmp_path):
    result = import_run(str(translator), tmp_path / "run", "shakespeare", print)
    assert result.max_difference < 1e-4
    run, texts = bothways.load(tmp_path / "run"), ["the king", "the queen sees the dog and the king"]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(translator).eval()
    words = transformers.AutoTokenizer.from_pretrained(translator)
    start = list(run.tokenizer.target_start)
    for text, mine in zip(texts, run.sample(texts, max_tokens=9, greedy=True), strict=True):
        assert run.encode_prompt(text) == words(text).input_ids
        forced = {"forced_bos_token_id": start[1]} if len(start) > 1 else {}
        with torch.no_grad():
            row = theirs.generate(
                **words([text], return_tensors="pt"),
                max_new_tokens=9 + len(forced),
                do_sample=False,
                num_beams=1,
                **forced,
            )[0].tolist()
        assert row[: len(start)] == start
        assert mine.text == words.decode([i for i in row[len(start) :] if i < len(words)], skip_special_tokens=True)
    score = run.score(["the king\tder Hund"])[0]
    with torch.no_grad():
        target = torch.tensor([[*run.tokenizer.of_targets.encode("der Hund"), run.tokenizer.eos]])
        given = torch.tensor([[*start, *target[0, :-1].tolist()]])
        logits = theirs(**words(["the king"], return_tensors="pt"), decoder_input_ids=given).logits[0, len(start) - 1 :]
        wanted = logits.log_softmax(-1).gather(1, target.T).sum().item()
    assert abs(score.logprob - wanted) < 1e-3 * abs(wanted)
    export_run(tmp_path / "run", tmp_path / "a", print)
    import_run(str(tmp_path / "a"), tmp_path / "again", "shakespeare", print)
    export_run(tmp_path / "again", tmp_path / "b", print)
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert type(there) is type(words)
    assert there(texts).input_ids == words(texts).input_ids
    assert there(text_target=texts).input_ids == words(text_target=texts).input_ids


def test_training_reads_targets_by_the_model_of_targets(tmp_path):
    save_marian(tmp_path / "vocabulary")
    ours = Tokenizer.load(tmp_path / "vocabulary")
    rows = [{"source": "the dog sees", "target": "Schloß geht über"}, {"source": "the king", "target": "über das Haus"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows * 30)))
    cfg = DataConfig(corpus=str(tmp_path / "pairs.jsonl"), source_field="source", target_field="target")
    tokens = prepare(corpora.load(cfg), "train", ours, str(tmp_path / "cache"))
    ends = np.append(tokens.starts[1:], len(tokens.ids))
    found = [tokens.ids[a + 1 : b - 1].tolist() for a, b in zip(tokens.starts, ends, strict=True)]
    of = {"source": ours.encode, "target": ours.of_targets.encode}
    known = [[of[side](row[side]) for side in of] for row in rows]
    assert known[0][1] != ours.encode("Schloß geht über")
    assert sorted(map(list, zip(found[::2], found[1::2], strict=True)))[:: len(found) // 2 - 1] == sorted(known)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda home: said(home, separate_vocabs=True), ["separate_vocabs", "one vocab.json for both is supported"]),
        (
            lambda home: (
                said(home, "config.json", share_encoder_decoder_embeddings=False),
                (home / "target.spm").unlink(),
            ),
            ["share_encoder_decoder_embeddings=false", "a vocabulary for each side"],
        ),
        (lambda home: (home / "target.spm").unlink(), ["has source.spm and no target.spm;", "fetch what is missing"]),
        (lambda home: (home / "vocab.json").unlink(), ["no vocab.json;", "source.spm, target.spm, vocab.json: fetch"]),
        (lambda home: (home / "source.spm").write_bytes(b"none"), ["the vocabulary in", "cannot be read"]),
        (lambda home: (home / "vocab.json").write_text('{"</s>": 0, "<unk>": 1, "<pad>": 1}'), ["from 0 on, each once"]),
        (
            lambda home: (home / "vocab.json").write_text('{"</s>": 0, "<unk>": "1"}'),
            ["the vocabulary in", "cannot be read"],
        ),
        (lambda home: said(home, eos_token="</end>"), ["eos_token '</end>'", "vocab.json does not hold"]),
    ],
)
def test_a_marian_vocabulary_that_is_none_is_refused(change, says, tmp_path, capfd):
    source = tmp_path / "source"
    save_marian(source)
    config = transformers.MarianConfig(vocab_size=40, pad_token_id=1, **SIDES | {"max_position_embeddings": 64})
    transformers.MarianMTModel(config).save_pretrained(source)
    change(source)
    refused(source, tmp_path / "run", capfd, *says)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("M2M100", ["sentencepiece.bpe.model alone", "vocab.json beside it (M2M-100)", "tokenizer.json (NLLB)"]),
        ("XLMRoberta", ["sentencepiece.bpe.model alone, which is not read", "AutoTokenizer.from_pretrained(DIR)"]),
    ],
)
def test_pieces_without_numbers_are_refused_and_what_the_message_says_gives_the_ids(kind, says, tmp_path, capfd):
    source, text = tmp_path / "source", "the dog sees Straße"
    config = getattr(transformers, f"{kind}Config")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 9}
    sizes = SIDES if kind == "M2M100" else sizes | {"type_vocab_size": 1, "max_position_embeddings": 34}
    made = config(vocab_size=40, pad_token_id=1, **sizes)
    (transformers.M2M100ForConditionalGeneration if kind == "M2M100" else transformers.XLMRobertaForMaskedLM)(
        made
    ).save_pretrained(source)
    (source / "sentencepiece.bpe.model").write_bytes(model(2))
    refused(source, tmp_path / "run", capfd, *says)
    if kind == "XLMRoberta":
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(source)
        import_run(str(source), tmp_path / "run", "shakespeare", print)
        pieces = spm.SentencePieceProcessor(model_proto=model(2)).encode(text)
        assert Tokenizer.load(tmp_path / "run").encode(text) == [i + 1 if i else 3 for i in pieces]


def said(home: Path, name: str = "tokenizer_config.json", **settings) -> None:
    path = home / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("setting", [{"src_lang": "deu_Latn"}, {"language_codes": "nllb"}, {"tgt_lang": "xx"}])
def test_a_language_that_m2m_100_has_not_is_refused(setting, tmp_path):
    save_m2m(tmp_path)
    said(tmp_path, **setting)
    with pytest.raises(bothways.errors.InputError, match=next(iter(setting))):
        M2MPieces.read(tmp_path / "sentencepiece.bpe.model", {"decoder_start_token_id": 2})
