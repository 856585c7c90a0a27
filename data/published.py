"""Published vocabularies: byte-level BPE, WordPiece and the rest, through the `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bothways.data.tokenizer import MASK, Tokenizer
from bothways.errors import InputError

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
KNOWN = {  # how the roles are called where a checkpoint does not say
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


def byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, the others from U+0100 on (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class PublishedTokenizer(Tokenizer):
    """A vocabulary of the `tokenizers` library, with the parts that its special tokens play.

    Every token stands for some bytes, and a text is the bytes of its tokens one after the other. Byte-level BPE loses
    nothing. WordPiece loses what its normalisation drops (case, accents, where spaces were); a piece that begins a
    word stands for a space and its letters.
    """

    def __init__(self, model: str, roles: dict[str, str]):
        """`model` is the text of a tokenizer.json; `roles` maps those of ROLES that there are to tokens."""
        self.model, self.roles = model, roles
        self.fast = tokenizers.Tokenizer.from_str(model)
        self.fast.no_truncation()
        self.fast.no_padding()
        ids = {role: self.fast.token_to_id(token) for role, token in roles.items()}
        self.bos, self.eos = ids.get("cls", ids.get("bos")), ids.get("sep", ids.get("eos"))
        self.mask, self.pad, self.unk = ids.get("mask"), ids["pad"], ids.get("unk", self.eos)
        around = self.fast.encode("", add_special_tokens=True).ids
        self.opening = tuple(around) if around == [self.bos] else ()
        added = self.fast.get_added_tokens_decoder()
        self.special = sorted({i for i, token in added.items() if token.special} | set(ids.values()))
        self._size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())
        self._bytes = self._token_bytes({i: token.content for i, token in added.items()})

    def _token_bytes(self, added: dict[int, str]) -> list[bytes]:
        parts = json.loads(self.fast.to_str())
        kinds = {part.get("type") for name in ("pre_tokenizer", "decoder") for part in _flat(parts[name])}
        characters = byte_of_character()
        prefix = parts["model"].get("continuing_subword_prefix") or "##"

        def text(token: int, piece: str) -> bytes:
            if token in added:
                return added[token].encode()
            if "ByteLevel" in kinds:
                return bytes(characters[c] for c in piece) if set(piece) <= characters.keys() else piece.encode()
            if parts["model"]["type"] == "WordPiece":
                inner = piece.startswith(prefix)
                return (piece[len(prefix) :] if inner else (" " if piece[:1].isalnum() else "") + piece).encode()
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes.fromhex(piece[3:5])
            return piece.replace("\u2581", " ").encode()

        pieces = self.fast.get_vocab(with_added_tokens=True)
        found = [b""] * self._size
        for piece, token in pieces.items():
            found[token] = text(token, piece)
        return found

    def __len__(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256((self.model + json.dumps(self.roles, sort_keys=True)).encode()).hexdigest()[:16]

    def _with_mask(self, text: str) -> str:
        return text.replace(MASK, self.roles["mask"]) if self.mask is not None else text

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(self._with_mask(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        encoding = self.fast.encode(text, add_special_tokens=False)
        return [(token, begin, end) for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.fast.encode_batch([self._with_mask(t) for t in texts], add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        silent = set(self.special)
        said = (MASK.encode() if i == self.mask else b"" if i in silent else self._bytes[i] for i in map(int, ids))
        return b"".join(said).decode(errors="replace")

    def piece(self, token: int) -> str:
        return self._bytes[int(token)].decode(errors="replace")

    def is_byte(self, token: int) -> bool:
        return "\ufffd" in self.piece(token)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(b) for b in self._bytes], np.int64)
        lengths[self.special] = 0
        return lengths

    def role_ids(self) -> dict[str, int]:
        return {role: self.fast.token_to_id(token) for role, token in self.roles.items()}

    def save_in(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "tokenizer.json").write_text(self.model, encoding="utf-8", newline="")
        said = {f"{role}_token": token for role, token in self.roles.items()}
        (home / "tokenizer_config.json").write_text(
            json.dumps(
                said | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, sort_keys=True, ensure_ascii=False
            )
        )

    @classmethod
    def read(cls, path: Path, config: dict[str, Any] | None = None) -> "PublishedTokenizer":
        """A tokenizer.json, or in its place the vocabulary files of GPT-2, RoBERTa or BERT.

        Roles come from the files beside it, then from `config` (a config.json's `bos_token_id` and the like), then
        from the usual names.

        Raises:
          InputError: no such file, no vocabulary in it, or nothing that opens and closes a text.
        """
        home, text = path.parent, ""
        try:
            if path.exists():
                text = path.read_bytes().decode()
                fast = tokenizers.Tokenizer.from_str(text)
            else:
                fast = _from_vocabulary_files(home)
                text = fast.to_str()
            said: dict[str, Any] = {}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (home / name).exists():
                    said |= json.loads((home / name).read_text())
        except InputError:
            raise
        except Exception as e:  # the library raises plain Exception for what it cannot parse
            raise InputError(f"the vocabulary in {home} cannot be read: {str(e)[:200]}") from e
        return cls(text, roles_of(fast, said, config or {}, home))


def roles_of(fast: tokenizers.Tokenizer, said: dict[str, Any], config: dict[str, Any], where: Path) -> dict[str, str]:
    """Which token plays which part. Raises InputError where nothing opens or closes a text."""
    roles = {}
    for role in ROLES:
        told = said.get(f"{role}_token")
        number = config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) else number
        candidates = [told.get("content") if isinstance(told, dict) else told]
        candidates += [fast.id_to_token(number)] if number is not None else []
        candidates += KNOWN[role]
        found = next((c for c in candidates if c and fast.token_to_id(c) is not None), None)
        if found is not None:
            roles[role] = found
    if not {"bos", "cls"} & roles.keys() or not {"eos", "sep"} & roles.keys():
        raise InputError(
            f"the vocabulary in {where} does not say which token opens and which closes a text; put a "
            'tokenizer_config.json beside it, with "bos_token" and "eos_token" (or "cls_token" and "sep_token")'
        )
    roles.setdefault("pad", roles.get("sep", roles.get("eos")))  # padding is hidden, whatever stands there
    return roles


def _flat(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json and, where it is a sequence, its members."""
    if not part:
        return []
    return [part, *(p for key in ("pretokenizers", "decoders") for member in part.get(key, ()) for p in _flat(member))]


def _from_vocabulary_files(home: Path) -> tokenizers.Tokenizer:
    """From vocab.json and merges.txt (byte-level BPE), or vocab.txt (WordPiece), as they were first published."""
    if (home / "vocab.json").exists() and (home / "merges.txt").exists():
        vocab = json.loads((home / "vocab.json").read_text())
        lines = (home / "merges.txt").read_text().split("\n")
        return byte_level_bpe(vocab, [line for line in lines if line and not line.startswith("#version")])
    if (home / "vocab.txt").exists():
        lines = (home / "vocab.txt").read_text().split("\n")
        vocab = {token: i for i, token in enumerate(lines) if token}
        settings = home / "tokenizer_config.json"
        lower = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else "the" in vocab
        fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
        fast.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
        fast.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        fast.decoder = tokenizers.decoders.WordPiece()
        fast.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab])
        return fast
    raise InputError(
        f"{home} holds no vocabulary: wanted tokenizer.json, or vocab.json and merges.txt, or vocab.txt "
        "(`transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes tokenizer.json)"
    )


def byte_level_bpe(vocab: dict[str, int], merges: list[str], special: Iterable[str] = ()) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer. `merges`: "a b" in the order of their ranks."""
    pairs = [tuple(line.split(" ")) for line in merges]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    names = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>")
    found = [t for t in (*names, *special) if t in vocab]
    fast.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in found])
    if "<mask>" in vocab:  # takes the space before it along
        fast.add_special_tokens([tokenizers.AddedToken("<mask>", special=True, lstrip=True)])
    return fast
