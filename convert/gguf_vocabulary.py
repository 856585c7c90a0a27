"""Vocabularies in GGUF files: byte-level BPE (`gpt2`), sentencepiece (`llama`) and WordPiece (`bert`), in both directions."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from bothways.data.cuts import CUTS, splitting
from bothways.data.published import PublishedTokenizer, roles_of
from bothways.data.tokenizer import SentencePieceTokenizer, Tokenizer
from bothways.data.vocabulary_files import byte_level_bpe, from_pieces, wordpiece
from bothways.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of tokens. Control tokens stand for no text; user-defined ones are found in a text before it is cut."""
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask", "cls": "cls", "seperator": "sep"}
"""llama.cpp's names of the parts, its spelling included, and ours."""
SPACE = "\u2581"


def read(said: dict[str, Any], path: Path) -> PublishedTokenizer:
    """The vocabulary of a GGUF file, from its key-value pairs.

    Raises:
      InputError: none, or of a kind that is not known here.
    """
    kind = said.get("tokenizer.ggml.model")
    kinds = {"gpt2": _read_byte_level, "llama": _read_sentencepiece, "bert": _read_wordpiece}
    if kind not in kinds:
        raise InputError(
            f"{path} holds a {kind!r} vocabulary; there are {', '.join(kinds)}: "
            "import the original checkpoint with its tokenizer.json"
        )
    names = said["tokenizer.ggml.tokens"]
    types = said.get("tokenizer.ggml.token_type") or [NORMAL] * len(names)
    fast, opens = kinds[kind](said, names, types)
    ids = {f"{ours}_token_id": said.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in ROLES.items()}
    if kind == "bert":
        ids = {"cls_token_id": ids["bos_token_id"], "sep_token_id": ids["eos_token_id"]} | {
            k: v for k, v in ids.items() if v is not None and k not in ("bos_token_id", "eos_token_id")
        }
    roles = roles_of(fast, {}, ids, path)
    if kind != "bert" and said.get("tokenizer.ggml.add_bos_token", opens):
        bos = roles["bos"]
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    template = said.get("tokenizer.chat_template")
    return PublishedTokenizer(fast.to_str(), roles, {"chat_template": template} if template else {})


def _read_byte_level(said: dict[str, Any], names: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    """And whether llama.cpp puts BOS first where the file does not say."""
    special = [name for name, kind in zip(names, types, strict=True) if kind == CONTROL]
    cut = said.get("tokenizer.ggml.pre") or "default"
    cut = "gpt-2" if cut == "default" else cut
    if cut not in CUTS:
        raise InputError(f"this GGUF file cuts texts as {cut!r}; there are default, {', '.join(CUTS)}")
    llama3 = cut == "llama-bpe"  # of these llama.cpp takes words whole
    vocab = {name: i for i, name in enumerate(names)}
    fast = byte_level_bpe(vocab, said["tokenizer.ggml.merges"], special, whole_words=llama3, cut=cut)
    added = [name for name, kind in zip(names, types, strict=True) if kind == USER_DEFINED]
    fast.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in added])
    return fast, llama3


def _read_sentencepiece(said: dict[str, Any], names: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    by_type = {t: [i for i, kind in enumerate(types) if kind == t] for t in (UNKNOWN, CONTROL, USER_DEFINED)}
    special = [*by_type[CONTROL], *by_type[UNKNOWN]]
    unknown = said.get("tokenizer.ggml.unknown_token_id", next(iter(by_type[UNKNOWN]), None))
    fast = from_pieces(names, said["tokenizer.ggml.scores"], special, by_type[USER_DEFINED], unknown)
    parts = tokenizers.normalizers
    first = [parts.Prepend(SPACE)] if said.get("tokenizer.ggml.add_space_prefix", True) else []
    fast.normalizer = parts.Sequence([*first, parts.Replace(" ", SPACE)])
    decoders = tokenizers.decoders
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if first else []))
    return fast, True


def _read_wordpiece(said: dict[str, Any], names: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    """A piece that begins a word has a space before it there, and one inside a word has "##" here."""
    vocab = {}
    for i, (name, kind) in enumerate(zip(names, types, strict=True)):
        whole = kind in (CONTROL, UNKNOWN) or (name.startswith("[") and name.endswith("]"))
        vocab[name if whole else name[1:] if name.startswith(SPACE) else f"##{name}"] = i
    return wordpiece(vocab, {}), False


# ---- out --------------------------------------------------------------------------------------------------------------


def write(writer: Any, tokenizer: Tokenizer) -> None:
    """Put a vocabulary into a GGUF file.

    Args:
      writer: a gguf.GGUFWriter.

    Raises:
      InputError: llama.cpp would cut texts otherwise than this vocabulary does.
    """
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_trained_here(writer, tokenizer)
    elif not isinstance(tokenizer, PublishedTokenizer):
        raise InputError("llama.cpp reads no vocabulary of a translator; export to a directory")
    else:
        _write_published(writer, tokenizer)


def _write_pieces(writer: Any, model: str, names: list[str], types: list[int], roles: dict[str, int | None]) -> None:
    writer.add_tokenizer_model(model)
    writer.add_token_list(names)
    writer.add_token_types(types)
    for theirs, ours in ROLES.items():
        if roles.get(ours) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", roles[ours])


def _write_trained_here(writer: Any, tokenizer: SentencePieceTokenizer) -> None:
    sp = tokenizer.sp
    scores = [sp.get_score(i) for i in range(len(tokenizer))]
    plain = [s for i, s in enumerate(scores) if not (i in tokenizer.special or sp.is_byte(i)) and s]
    if any(s != round(s) for s in plain):
        raise InputError(
            "this run's vocabulary is a unigram model, and llama.cpp merges pieces: its tokens would be others. "
            "Train with --data.tokenizer bpe for GGUF, or export to a directory"
        )
    names, types = [sp.id_to_piece(i) for i in range(len(tokenizer))], []
    for i, name in enumerate(names):
        known = {tokenizer.unk: UNKNOWN, tokenizer.mask: USER_DEFINED, sp.piece_to_id("\n"): USER_DEFINED}
        kind = CONTROL if i in tokenizer.special else BYTE if sp.is_byte(i) else NORMAL
        types.append(known.get(i, kind) if name else kind)
    roles = {
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "unk": tokenizer.unk,
        "pad": tokenizer.pad,
        "mask": tokenizer.mask,
    }
    _write_pieces(writer, "llama", names, types, roles)
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer.bos in tokenizer.opening)
    writer.add_add_eos_token(False)


def _write_published(writer: Any, tokenizer: PublishedTokenizer) -> None:
    parts = json.loads(tokenizer.fast.to_str())
    model = parts["model"]
    by_id = {i: name for name, i in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
    names = [by_id.get(i, f"[PAD{i}]") for i in range(len(tokenizer))]
    added = tokenizer.fast.get_added_tokens_decoder()
    types = [NORMAL if i in by_id else UNKNOWN for i in range(len(tokenizer))]
    for i, token in added.items():
        types[i] = CONTROL if token.special else USER_DEFINED
    roles = {role: tokenizer.fast.token_to_id(token) for role, token in tokenizer.roles.items()}
    kinds = {"WordPiece": _write_wordpiece, "BPE": _write_bpe}
    if model["type"] not in kinds:
        raise InputError(f"a vocabulary of the kind {model['type']} is none of llama.cpp's; export to a directory")
    kinds[model["type"]](writer, tokenizer, parts, names, types, roles)


def _write_wordpiece(writer, tokenizer, parts, names, types, roles) -> None:
    if (parts["normalizer"] or {}).get("lowercase") is False:
        raise InputError(
            "llama.cpp turns all text of a WordPiece vocabulary into lower case, and this one keeps capitals: the file would "
            "be read otherwise there; export to a directory"
        )
    pieces = []
    for name, kind in zip(names, types, strict=True):
        inside, whole = name.startswith("##"), kind != NORMAL or (name.startswith("[") and name.endswith("]"))
        pieces.append(name if whole else name[2:] if inside else SPACE + name)
    roles = roles | {"bos": roles.get("cls"), "eos": roles.get("sep")}
    _write_pieces(writer, "bert", pieces, types, roles)
    writer.add_tokenizer_pre("default")


def _write_bpe(writer, tokenizer, parts, names, types, roles) -> None:
    model, opens = parts["model"], tokenizer.bos in tokenizer.opening
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        first = {}
        for rank, merge in enumerate(merges):
            first.setdefault(merge.replace(" ", "", 1), rank)
        types = [
            BYTE if n.startswith("<0x") and n.endswith(">") and len(n) == 6 else t
            for n, t in zip(names, types, strict=True)
        ]
        unknown = names.index(model["unk_token"]) if model.get("unk_token") in names else None
        types = [UNKNOWN if i == unknown else t for i, t in enumerate(types)]
        _write_pieces(writer, "llama", names, types, roles)
        writer.add_token_scores([-float(first[n]) if n in first else -float(len(merges)) for n in names])
        writer.add_add_space_prefix("Prepend" in json.dumps(parts["normalizer"]))
    else:
        _write_pieces(writer, "gpt2", names, types, roles)
        writer.add_token_merges(merges)
        writer.add_tokenizer_pre(_cut_of(parts["pre_tokenizer"]))
    writer.add_add_bos_token(opens)
    writer.add_add_eos_token(False)


def _cut_of(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a tokenizer.json cuts texts. Raises InputError where it has none that is known here."""

    def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
        keys = ("type", "pattern", "behavior", "invert", "individual_digits", "use_regex", "add_prefix_space")
        found = (part or {}).get("pretokenizers") or [part or {}]
        return [{key: step[key] for key in keys if key in step} for step in found]

    for kind in CUTS:
        if steps(json.loads(_bare(kind).to_str())["pre_tokenizer"]) == steps(pre):
            return kind
    raise InputError(
        f"llama.cpp cuts texts in none of the known ways ({', '.join(CUTS)}) as this vocabulary does; export to a directory"
    )


def _bare(kind: str) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = splitting(kind)
    return fast
