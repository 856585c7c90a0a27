"""Vocabularies as `tokenizers.Tokenizer`s: from the files that GPT-2, RoBERTa, Qwen 2 and BERT came with, from the parts of a
GGUF file, and from a sentencepiece model that was trained here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
import tokenizers

from bothways.data.cuts import CUT_OF_CLASS, normalizer, splitting
from bothways.errors import InputError

SPACE = "\u2581"
"""How sentencepiece writes a space."""
HOW_TO_WRITE = "`transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes tokenizer.json"
Settings = dict[str, Any]
"""A tokenizer_config.json."""


def from_files(home: Path, settings: Settings) -> tokenizers.Tokenizer:
    """From vocab.json and merges.txt (byte-level BPE), or vocab.txt (WordPiece), as they were first published.

    Raises:
      InputError: neither is there; or vocab.json of a class that is not known to cut texts as one of data/cuts.py.
    """
    if (home / "vocab.json").exists() and (home / "merges.txt").exists():
        vocab = json.loads((home / "vocab.json").read_text())
        lines = (home / "merges.txt").read_text().split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        prefix_space = bool(settings.get("add_prefix_space"))
        return byte_level_bpe(vocab, merges, prefix_space=prefix_space, cut=_cut_of_class(home, settings))
    if (home / "vocab.txt").exists():
        lines = (home / "vocab.txt").read_text().split("\n")
        return wordpiece({token: i for i, token in enumerate(lines) if token}, settings)
    others = sorted(p.name for p in home.iterdir() if p.suffix in (".model", ".spm")) if home.is_dir() else []
    found = f"has its vocabulary in {', '.join(others)} alone, which is not read" if others else "holds no vocabulary"
    raise InputError(
        f"{home} {found}: wanted tokenizer.json, or vocab.json and merges.txt, or vocab.txt ({HOW_TO_WRITE})"
    )


def _cut_of_class(home: Path, settings: Settings) -> str:
    name = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if name.removesuffix("Fast") not in CUT_OF_CLASS:
        raise InputError(
            f"the vocab.json in {home} is of a {name}, which may cut texts otherwise than {', '.join(CUT_OF_CLASS)} do; "
            f"put a tokenizer.json beside it ({HOW_TO_WRITE})"
        )
    return CUT_OF_CLASS[name.removesuffix("Fast")]


def token_in(settings: Settings, role: str, default: str | None = None) -> str | None:
    """The token that plays a part by a tokenizer_config.json, where it may be a string or an object."""
    found = settings.get(f"{role}_token") or default
    return found["content"] if isinstance(found, dict) else found


def wordpiece(vocab: dict[str, int], settings: Settings) -> tokenizers.Tokenizer:
    """BERT's tokenizer, opened and closed by [CLS] and [SEP]. Lower case unless the settings say no; where they say
    nothing, unless the vocabulary has capital letters."""
    usual = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    roles = {role: token_in(settings, role, token) for role, token in usual.items()}
    capitals = any(piece != piece.lower() for piece in vocab if not (piece.startswith("[") and piece.endswith("]")))
    lower = settings.get("do_lower_case", not capitals)
    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=roles["unk"]))
    fast.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=lower,
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast.decoder = tokenizers.decoders.WordPiece()
    fast.add_special_tokens([t for t in roles.values() if t in vocab])
    cls, sep = roles["cls"], roles["sep"]
    if cls in vocab and sep in vocab:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
        )
    return fast


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[str],
    special: Iterable[str] = (),
    *,
    prefix_space: bool = False,
    whole_words: bool = False,
    cut: str = "gpt-2",
) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer, or one that cuts otherwise; RoBERTa's, where the vocabulary has its mask, between `<s>` and `</s>`.

    Args:
      merges: "a b" in the order of their ranks.
      cut: one of CUTS.
      whole_words: a word that is in the vocabulary is taken whole, whatever the merges say (Llama 3).
    """
    pairs = [tuple(line.split(" ")) for line in merges]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, ignore_merges=whole_words))
    fast.normalizer, fast.pre_tokenizer = normalizer(cut), splitting(cut, prefix_space)
    fast.decoder = tokenizers.decoders.ByteLevel()
    names = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>")
    found = [t for t in dict.fromkeys((*names, *special)) if t in vocab]
    fast.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in found])
    if "<mask>" in vocab:  # takes the space before it along
        fast.add_special_tokens([tokenizers.AddedToken("<mask>", special=True, lstrip=True)])
        if {"<s>", "</s>"} <= vocab.keys():
            ends = (("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))
            fast.post_processor = tokenizers.processors.RobertaProcessing(*ends, add_prefix_space=prefix_space)
    return fast


def add_tokens(fast: tokenizers.Tokenizer, home: Path, settings: Settings, rows: int | None) -> bool:
    """Tokens that were added to a vocabulary later, and that its own file does not hold.

    They come from added_tokens.json and from `added_tokens_decoder` in the settings, with their ids; and from the
    settings' parts (`pad_token` and the like), which take the next ids as long as the table of `rows` has them.

    Returns:
      whether there were any.

    Raises:
      InputError: their ids do not follow the vocabulary's.
    """
    path = home / "added_tokens.json"
    listed = {i: tokenizers.AddedToken(t) for t, i in (json.loads(path.read_text()) if path.exists() else {}).items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, token in settings.get("added_tokens_decoder", {}).items():
        named = {flag: token[flag] for flag in flags if flag in token}
        listed[int(number)] = tokenizers.AddedToken(token["content"], **named)
    special = {token_in(settings, role) for role in ("pad", "unk", "bos", "eos", "cls", "sep", "mask")}
    before = len(fast.get_added_tokens_decoder())
    for number, token in sorted(listed.items()):
        known = {t.content for t in fast.get_added_tokens_decoder().values()}
        if token.content not in known:
            token.special = token.special or token.content in special
            (fast.add_special_tokens if token.special else fast.add_tokens)([token])
            if fast.token_to_id(token.content) != number:
                raise InputError(
                    f"{home}: the token {token.content!r} was added as number {number}, and comes to stand at "
                    f"{fast.token_to_id(token.content)}; tokens between are missing"
                )
    for content in sorted(t for t in special if t is not None and fast.token_to_id(t) is None):
        if rows is not None and fast.get_vocab_size() < rows:
            fast.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
    return len(fast.get_added_tokens_decoder()) > before


def without_rows_beyond(text: str, rows: int) -> tuple[str, list[str]]:
    """A tokenizer.json without the added tokens that a table of so many rows has no row for, and which those were."""
    parts = json.loads(text)
    beyond = [t["content"] for t in parts["added_tokens"] if t["id"] >= rows]
    inside = parts["model"]["vocab"]
    names = set(inside) if isinstance(inside, dict) else {piece for piece, _ in inside}
    gone = [content for content in beyond if content not in names]
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] not in gone]
    return (json.dumps(parts, ensure_ascii=False) if gone else text), gone


# ---- a sentencepiece model that was trained here --------------------------------------------------------------------


def from_sentencepiece(sp: spm.SentencePieceProcessor, special: list[int], symbols: list[int]) -> tokenizers.Tokenizer:
    """The same vocabulary for the `tokenizers` library: the same ids for every text, and the same text for those ids.

    Text that spells a special token, such as `[CLS]`, is that token, as in every published vocabulary.

    Args:
      special: ids of pieces that stand for no text, the unknown token second.
      symbols: ids of user-defined symbols, which are found before anything else is.
    """
    # sentencepiece writes a space as U+2581. Here it is a space, so that a text's own U+2581 is spelt in bytes, as encode does.
    pieces = [sp.id_to_piece(i).replace(SPACE, " ") for i in range(sp.get_piece_size())]
    scores = [sp.get_score(i) for i in range(sp.get_piece_size())]
    plain = [i for i in range(len(pieces)) if not (i in special or i in symbols or sp.is_byte(i))]
    ranks = [round(-scores[i]) for i in plain]
    pre = tokenizers.pre_tokenizers
    if ranks == list(range(len(plain))) and all(scores[i] == -r for i, r in zip(plain, ranks, strict=True)):
        vocab = {piece: i for i, piece in enumerate(pieces)}
        model = tokenizers.models.BPE(
            vocab, _merges([pieces[i] for i in plain]), unk_token=pieces[special[1]], fuse_unk=True, byte_fallback=True
        )
        fast = tokenizers.Tokenizer(model)
    else:
        model = tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), special[1], byte_fallback=True)
        fast = tokenizers.Tokenizer(model)
        # A text that spells a byte, `<0x0A>`, is cut behind its bracket: it is six characters, not that byte.
        spelt = tokenizers.Regex(r"<(?=0x[0-9A-F]{2}>)")
        fast.pre_tokenizer = pre.Split(spelt, "merged_with_previous")
    decoders = tokenizers.decoders
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_tokens([tokenizers.AddedToken(pieces[i], normalized=False) for i in symbols])
    fast.add_special_tokens([tokenizers.AddedToken(pieces[i], special=True, normalized=False) for i in special])
    return fast


def from_pieces(
    pieces: list[str], scores: list[float], special: list[int], symbols: list[int], unknown: int | None
) -> tokenizers.Tokenizer:
    """A sentencepiece BPE vocabulary by its pieces and scores, such as a GGUF file holds; spaces are U+2581, and whoever
    calls says how texts become that.

    Args:
      special: ids that stand for no text; symbols: ids that are found before anything else is.
      unknown: the id of what no piece spells; None: nothing is, where every byte is a piece.
    """
    apart = {*special, *symbols}
    ranked = sorted((i for i in range(len(pieces)) if i not in apart), key=lambda i: -scores[i])
    model = tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        _merges([pieces[i] for i in ranked]),
        unk_token=None if unknown is None else pieces[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    fast = tokenizers.Tokenizer(model)
    fast.add_tokens([tokenizers.AddedToken(pieces[i], normalized=False) for i in symbols])
    fast.add_special_tokens([tokenizers.AddedToken(pieces[i], special=True, normalized=False) for i in special])
    return fast


def _merges(ranked: list[str]) -> list[tuple[str, str]]:
    """Merges of a BPE vocabulary, from its pieces in the order in which they were made: every way to make each."""
    known = set(ranked)
    halves = [(piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece))]
    return [(a, b) for a, b in halves if a in known and b in known]


def template_in(settings: dict[str, Any]) -> str:
    """The chat template in a tokenizer_config.json; of several named ones the default."""
    found = settings.get("chat_template") or ""
    if isinstance(found, list):
        found = next((each.get("template", "") for each in found if each.get("name") == "default"), "")
    return found if isinstance(found, str) else ""
