"""Published vocabularies: byte-level BPE, WordPiece and the rest, through the `tokenizers` library."""

import copy
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bothways.data.tokenizer import MASK, Tokenizer
from bothways.data.vocabulary_files import add_tokens, from_files, template_in, token_in, without_rows_beyond
from bothways.errors import InputError

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
START = "decoder_start"
"""The setting that says which tokens open an encoder-decoder's target."""
KNOWN = {  # how the roles are called where a checkpoint does not say
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
FORGOTTEN = (
    "auto_map",
    "added_tokens_decoder",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "backend",
    "is_local",
    "local_files_only",
    "extra_special_tokens",
)
"""Settings that speak of a place or of code, or that tokenizer.json has itself."""


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

    def __init__(self, model: str, roles: dict[str, str], settings: dict[str, Any] | None = None):
        """
        Args:
          model: the text of a tokenizer.json.
          roles: those of ROLES that there are -> token.
          settings: the rest of tokenizer_config.json, the chat template among it: kept for whoever reads it next.
        """
        self.model, self.roles, self.settings = model, roles, settings or {}
        self.fast = tokenizers.Tokenizer.from_str(model)
        self.fast.no_truncation()
        self.fast.no_padding()
        ids = {role: self.fast.token_to_id(token) for role, token in roles.items()}
        start = self.settings.get(START) or [None]
        self.bos, self.eos = ids.get("cls", ids.get("bos", start[0])), ids.get("sep", ids.get("eos"))
        self.mask, self.pad, self.unk = ids.get("mask"), ids["pad"], ids.get("unk", self.eos)
        around = self.fast.encode("", add_special_tokens=True).ids
        opens = self.settings.get("add_bos_token")  # what a tokenizer_config.json says goes before the post-processor
        self.opening = (self.bos,) if (around == [self.bos] if opens is None else opens) else ()
        added = self.fast.get_added_tokens_decoder()
        self.special = sorted({i for i, token in added.items() if token.special} | set(ids.values()))
        self._size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())
        self._bytes = self._token_bytes({i: token.content for i, token in added.items()})
        self.plain = self._without_control_tokens(model)

    @property
    def chat_template(self) -> str:
        return template_in(self.settings)

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.settings = self.settings | {"chat_template": template}

    @property
    def target_start(self) -> tuple[int, ...]:
        return tuple(self.settings.get(START) or [self.bos])

    def around_source(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if START not in self.settings:
            return super().around_source()
        before, _, behind = self._published_frame(False)
        return tuple(before), tuple(behind or [self.eos])

    def framing_as_published(self) -> "PublishedTokenizer":
        other = copy.copy(self)
        other.frame = functools.cache(self._published_frame)
        return other

    def _published_frame(self, pair: bool) -> tuple[list[int], list[int], list[int]]:
        found = self.fast.encode("a", "a") if pair else self.fast.encode("a")
        around: tuple[list[int], list[int], list[int]] = ([], [], [])
        seen = 0
        for token, text in zip(found.ids, found.sequence_ids, strict=True):
            if text is None:
                around[2 if seen == 1 + pair else seen].append(token)
            else:
                seen = text + 1
        opening = around[0] or list(self.opening)
        return opening, around[1], around[2]

    def _without_control_tokens(self, model: str) -> tokenizers.Tokenizer:
        """The same vocabulary, but a text's own "[SEP]" or "<|endoftext|>" is characters; the mask stays a token.

        All added tokens stay in the file, since those that the model does not know get their ids by their order in it.
        """
        parts, control = json.loads(model), set(self.special) - {self.mask}
        vocabulary = parts["model"]["vocab"]
        known = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
        control_before, self._moved = False, False
        for token in parts.get("added_tokens") or []:
            token["special"] = token["id"] in control
            if token["content"] not in known:
                control_before |= token["special"]
                self._moved |= control_before and not token["special"]
        plain = tokenizers.Tokenizer.from_str(json.dumps(parts))
        plain.encode_special_tokens = True
        plain.no_truncation()
        plain.no_padding()
        return plain

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
        # Where added tokens stand behind control tokens, texts had other ids up to version 0.2: what was prepared then is not read.
        now = " in place" if self._moved else ""
        return hashlib.sha256((self.model + json.dumps(self.roles, sort_keys=True) + now).encode()).hexdigest()[:16]

    def _with_mask(self, text: str) -> str:
        return text.replace(MASK, self.roles["mask"]) if self.mask is not None else text

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(self._with_mask(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        encoding = self.plain.encode(text, add_special_tokens=False)
        return [(token, begin, end) for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def encode_marked(self, text: str, marks: dict[str, int]) -> list[tuple[int, int, int]]:
        found = self.fast.encode(text, add_special_tokens=False)  # which knows its special tokens itself
        return [(token, begin, end) for token, (begin, end) in zip(found.ids, found.offsets, strict=True)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        found = self.plain.encode_batch([self._with_mask(t) for t in texts], add_special_tokens=False)
        return [e.ids for e in found]

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
        inputs = ["input_ids", *(["token_type_ids"] if self._pairs_have_types() else []), "attention_mask"]
        usual = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
        settings = (self.settings if "tokenizer_class" in self.settings else usual | self.settings) | {
            f"{role}_token": token for role, token in self.roles.items()
        }
        (home / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8"
        )

    def _pairs_have_types(self) -> bool:
        """Whether the second text of a pair has a segment type of its own."""
        return 1 in self.fast.encode("a", "a").type_ids and json.loads(self.model)["model"].get("type") == "WordPiece"

    def fitting(self, rows: int) -> tuple["PublishedTokenizer", list[str]]:
        """The vocabulary of a table of so many rows, and which added tokens were left out because it has none for them."""
        model, gone = without_rows_beyond(self.model, rows)
        if not gone:
            return self, []
        fast = tokenizers.Tokenizer.from_str(model)
        roles = {role: token for role, token in self.roles.items() if token not in gone}
        said = {START: self.settings.get(START)} | {f"{role}_token": token for role, token in roles.items()}
        roles = roles_of(fast, said, {}, Path())
        return PublishedTokenizer(model, roles, self.settings), gone

    @classmethod
    def read(cls, path: Path, config: dict[str, Any] | None = None) -> "PublishedTokenizer":
        """A tokenizer.json, or in its place the vocabulary files of GPT-2, RoBERTa or BERT.

        Roles come from the files beside it, then from `config` (a config.json's `bos_token_id` and the like), then
        from the usual names.

        Raises:
          InputError: no such file, no vocabulary in it, or nothing that opens and closes a text.
        """
        home, config, settings = path.parent, config or {}, {}
        try:
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (home / name).exists():
                    settings |= json.loads((home / name).read_text(encoding="utf-8"))
            template = home / "chat_template.jinja"
            if template.exists():
                settings["chat_template"] = template.read_text(encoding="utf-8")
            if path.exists():
                text = path.read_bytes().decode()
                fast = tokenizers.Tokenizer.from_str(text)
            else:
                fast = from_files(home, settings)
                text = fast.to_str()
            if add_tokens(fast, home, settings, config.get("vocab_size")):
                text = fast.to_str()
        except InputError:
            raise
        except Exception as e:  # the library raises plain Exception for what it cannot parse
            raise InputError(f"the vocabulary in {home} cannot be read: {str(e)[:200]}") from e
        if config.get("is_encoder_decoder"):
            settings |= target_start_of(config, home)
        roles = roles_of(fast, settings, config, home)
        kept = {
            key: value
            for key, value in settings.items()
            if key not in FORGOTTEN and key.removesuffix("_token") not in ROLES
        }
        return cls(text, roles, kept)


def roles_of(fast: tokenizers.Tokenizer, said: dict[str, Any], config: dict[str, Any], where: Path) -> dict[str, str]:
    """Which token plays which part. Raises InputError where nothing opens or closes a text."""
    roles = {}
    for role in ROLES:
        number = config.get(f"{role}_token_id")
        number = next(iter(number), None) if isinstance(number, list) else number
        candidates = [token_in(said, role)]
        candidates += [fast.id_to_token(number)] if number is not None and number >= 0 else []  # some say -1 for none
        candidates += KNOWN[role]
        found = next((c for c in candidates if c and fast.token_to_id(c) is not None), None)
        if found is not None:
            roles[role] = found
    opens = {"bos", "cls"} & roles.keys() or said.get(START)
    if not opens or not {"eos", "sep"} & roles.keys():
        raise InputError(
            f"the vocabulary in {where} does not say which token opens and which closes a text; put a "
            'tokenizer_config.json beside it, with "bos_token" and "eos_token" (or "cls_token" and "sep_token")'
        )
    roles.setdefault("pad", roles.get("sep", roles.get("eos")))  # padding is hidden, whatever stands there
    return roles


def target_start_of(config: dict[str, Any], home: Path) -> dict[str, list[int]]:
    """What an encoder-decoder's target begins with, as its config.json or its generation_config.json says: the token that it
    is started with, and one that must follow (the target's language). Nothing where they say nothing."""
    path = home / "generation_config.json"
    said = config | (json.loads(path.read_text()) if path.exists() else {})
    names = ("decoder_start_token_id", "forced_bos_token_id")
    found = [said.get(name) for name in names]
    found[0] = said.get("bos_token_id", said.get("pad_token_id")) if found[0] is None else found[0]
    return {START: [token for token in found if token is not None]} if found[0] is not None else {}


def _flat(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json and, where it is a sequence, its members."""
    if not part:
        return []
    return [part, *(p for key in ("pretokenizers", "decoders") for member in part.get(key, ()) for p in _flat(member))]
