"""Vocabularies of Marian and M2M-100: a sentencepiece model cuts texts into pieces, and vocab.json numbers these.

Marian    source.spm and target.spm, one for each side, and one vocab.json; a source ends with eos
M2M-100   sentencepiece.bpe.model; behind the pieces of vocab.json come the languages, and a source begins with its own
"""

import copy
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from bothways.data.published import FORGOTTEN, ROLES, START, target_start_of
from bothways.data.threads import threads
from bothways.data.tokenizer import CONFIG, SPACE, Tokenizer
from bothways.data.vocabulary_files import token_in
from bothways.errors import InputError

NUMBERS = "vocab.json"
USUAL = {"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}
EACH_ITS_OWN = ": a vocabulary for each side; one vocab.json for both is supported"
LANGUAGES = {
    "m2m100": """af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu
        hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd
        si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu""".split(),
    "wmt21": "en ha is ja cs ru zh de".split(),
}
"""By `language_codes` of tokenizer_config.json; their tokens have the numbers behind vocab.json in this order."""


class PieceTokenizer(Tokenizer):
    """Pieces by sentencepiece, numbers by vocab.json; a piece that has none is the unknown token.

    A text that spells a special token is characters. Spaces at the ends of a text and double ones are lost, as sentencepiece
    models of translators have it.
    """

    files: tuple[str, ...]
    """The sentencepiece models: of sources first, of targets last."""
    theirs: str
    """The class of `transformers` that reads the same files."""

    def __init__(self, models: tuple[bytes, ...], numbers: bytes, settings: dict[str, Any]):
        """
        Args:
          models: as `files` has them.
          numbers: vocab.json.
          settings: tokenizer_config.json; START in it says what a target begins with.

        Raises:
          InputError: numbers that are none, or without the tokens that end, pad and stand for what is unknown.
        """
        self.models, self.numbers, self.settings = models, numbers, settings
        self.sides = [spm.SentencePieceProcessor(model_proto=model) for model in models]
        self.sp = self.sides[0]
        self.ids = json.loads(numbers)
        if not isinstance(self.ids, dict) or sorted(self.ids.values()) != list(range(len(self.ids))):
            raise InputError(f"{NUMBERS} does not number its pieces from 0 on, each once")
        roles = {role: token_in(settings, role, token) for role, token in USUAL.items()}
        absent = [f"{role}_token {token!r}" for role, token in roles.items() if token not in self.ids]
        if absent:
            raise InputError(f"{NUMBERS} does not hold {', '.join(absent)} of {CONFIG}")
        self.pieces = [*sorted(self.ids, key=self.ids.__getitem__), *self._languages()]
        self.pad, self.unk, self.eos = (self.ids[roles[role]] for role in ("pad", "unk", "eos"))
        named = self.ids.get(token_in(settings, "bos", "<s>"))
        start = settings.get(START) or [self.pad if named is None else named]
        self.bos, self.mask = start[0] if named is None else named, None
        self.special = sorted({self.pad, self.unk, self.eos, self.bos, *range(len(self.ids), len(self.pieces))})
        said = json.dumps([self.target_start, self.around_source(), self.pad, self.unk, self.eos]).encode()
        self.fingerprint = hashlib.sha256(b"".join((*models, numbers, said))).hexdigest()[:16]

    def _languages(self) -> list[str]:
        """Tokens behind those of vocab.json, which stand for no text."""
        return []

    @functools.cached_property
    def of_targets(self) -> "PieceTokenizer":
        other = copy.copy(self)
        other.sp = self.sides[-1]
        return other

    @property
    def target_start(self) -> tuple[int, ...]:
        return tuple(self.settings.get(START) or [self.bos])

    def __len__(self) -> int:
        return len(self.pieces)

    def _language(self, text: str) -> str:
        """The name of a language that a source begins with and that is a token of its own; empty: none."""
        return ""

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        named = [self._language(text) for text in texts]
        rest = [text[len(name) :] for name, text in zip(named, texts, strict=True)]
        cut = self.sp.encode(rest, return_type=str, num_threads=threads())
        numbered = self.ids.get
        return [
            [numbered(piece, self.unk) for piece in ([name, *pieces] if name else pieces)]
            for name, pieces in zip(named, cut, strict=True)
        ]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        name = self._language(text)
        found = [(self.ids.get(name, self.unk), 0, len(name))] if name else []
        cut = self.sp.encode(text[len(name) :], return_type="offset_mapping")
        for piece, (begin, end) in zip(cut["pieces"], cut["offsets"], strict=True):
            found.append((self.ids.get(piece, self.unk), len(name) + begin, len(name) + end))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        silent = set(self.special)
        return self.sp.decode_pieces([self.pieces[i] for i in map(int, ids) if i not in silent]).strip()

    def piece(self, token: int) -> str:
        return self.pieces[int(token)].replace(SPACE, " ")

    def is_byte(self, token: int) -> bool:
        return False

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(self.piece(i).encode()) for i in range(len(self))], np.int64)
        lengths[self.special] = 0
        return lengths

    def role_ids(self) -> dict[str, int]:
        return {"pad": self.pad, "bos": self.bos, "eos": self.eos, "unk": self.unk}

    def save_in(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        for name, content in zip((*self.files, NUMBERS), (*self.models, self.numbers), strict=True):
            (home / name).write_bytes(content)
        settings = self.settings | ({START: list(self.target_start)} if START in self.settings else {})
        (home / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False), "utf-8")

    @classmethod
    def read(cls, path: Path, config: dict[str, Any] | None = None) -> "PieceTokenizer":
        """From the first of `files`, and what lies beside it.

        Args:
          config: a checkpoint's config.json, for what a target begins with; None: a run's own, which says it.

        Raises:
          InputError: a file is missing or damaged, or each side has a vocabulary of its own.
        """
        home, settings = path.parent, {}
        if (config or {}).get("share_encoder_decoder_embeddings") is False:
            raise InputError(f"{home / 'config.json'} says share_encoder_decoder_embeddings=false{EACH_ITS_OWN}")
        if absent := [name for name in (*cls.files, NUMBERS) if not (home / name).exists()]:
            raise InputError(
                f"{home} has {path.name} and no {' and no '.join(absent)}; the vocabulary of a {cls.theirs} is "
                f"{', '.join((*cls.files, NUMBERS))}: fetch what is missing from where the rest came from"
            )
        try:
            for name in ("special_tokens_map.json", CONFIG):
                if (home / name).exists():
                    settings |= json.loads((home / name).read_text("utf-8"))
            if settings.get("separate_vocabs"):
                raise InputError(f"{CONFIG} says separate_vocabs{EACH_ITS_OWN}")
            settings = {key: value for key, value in settings.items() if key not in FORGOTTEN}
            settings |= {f"{role}_token": token_in(settings, role) for role in ROLES if settings.get(f"{role}_token")}
            if config:
                settings |= target_start_of(config, home)
            models = tuple((home / name).read_bytes() for name in cls.files)
            return cls(models, (home / NUMBERS).read_bytes(), {"tokenizer_class": cls.theirs} | settings)
        except OSError as e:
            raise InputError(f"the vocabulary in {home} cannot be read: {e.filename}: {e.strerror}") from e
        except (ValueError, TypeError, AttributeError, RuntimeError) as e:  # no JSON, or of other types; no such model
            raise InputError(f"the vocabulary in {home} cannot be read: {str(e)[:200]}") from e


class MarianPieces(PieceTokenizer):
    """Sources may begin with the language that is wanted, `>>fra<< the text`."""

    files, theirs = ("source.spm", "target.spm"), "MarianTokenizer"

    def _language(self, text: str) -> str:
        end = text.find("<<") if text.startswith(">>") else -1
        return text[: end + 2] if end >= 0 else ""


class M2MPieces(PieceTokenizer):
    """`src_lang` of tokenizer_config.json opens a source (en where it says none); `tgt_lang` follows a target's first token."""

    files, theirs = ("sentencepiece.bpe.model",), "M2M100Tokenizer"

    def _languages(self) -> list[str]:
        kind = self.settings.get("language_codes", "m2m100")
        if kind not in LANGUAGES:
            raise InputError(f"{CONFIG}: language_codes is {kind!r}; there are {', '.join(LANGUAGES)}")
        return [f"__{code}__" for code in LANGUAGES[kind]]

    def _number(self, setting: str, default: str = "") -> tuple[int, ...]:
        code = self.settings.get(setting) or default
        if not code:
            return ()
        if f"__{code}__" not in self.pieces[len(self.ids) :]:
            codes = LANGUAGES[self.settings.get("language_codes", "m2m100")]
            raise InputError(f"{CONFIG}: {setting} is {code!r}, which is none of {', '.join(codes)}")
        return (self.pieces.index(f"__{code}__", len(self.ids)),)

    def around_source(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._number("src_lang", "en"), (self.eos,)

    @property
    def target_start(self) -> tuple[int, ...]:
        said = super().target_start
        return said if len(said) > 1 else (*said, *self._number("tgt_lang"))


KINDS: dict[str, type[PieceTokenizer]] = {kind.files[0]: kind for kind in (MarianPieces, M2MPieces)}
"""By the file that is read first."""
