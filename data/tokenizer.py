"""Tokenizers behind one small interface, and those that are learned here: text goes in and comes out unchanged."""

import abc
import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

from bothways.data.config import VOCABULARIES
from bothways.data.rng import splitmix64
from bothways.data.threads import threads
from bothways.errors import InputError

PAD, UNK, BOS, EOS, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
CONFIG = "tokenizer_config.json"
"""What stands beside a vocabulary: in a published one its special tokens, and of either kind the chat template."""
SPACE = "\u2581"  # how sentencepiece writes a space
LONGEST_LINE = 4096
"""Characters of a line that a vocabulary is trained on at once: sentencepiece leaves out lines of more than a megabyte,
and the likelihoods of lines of some 100,000 characters underflow."""
TRAINING_BYTES = 50_000_000
"""A vocabulary is trained on at most so much text; of a larger corpus, on a sample of its lines."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What making examples must know of a tokenizer, as arrays over its V tokens."""

    pad: int
    bos: int
    eos: int
    mask: int | None
    special: np.ndarray  # [V] bool: stands for no text; never hidden, never a random replacement
    ordinary: np.ndarray  # ids of all other tokens
    starts_word: np.ndarray
    """[V] bool: begins with anything but a letter, a digit or an apostrophe: a space, a line break, a punctuation mark."""
    ends_sentence: np.ndarray  # [V] bool: a line break, or ends with . ! or ?
    target_start: tuple[int, ...] = ()  # what an encoder-decoder's target begins with; empty: bos
    around_source: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # before and behind; None: nothing, and eos


def made_up_vocabulary(size: int) -> Vocabulary:
    """Without a tokenizer: five specials, every third token begins a word, every seventh ends a sentence."""
    ids = np.arange(size)
    special = ids < 5
    return Vocabulary(0, 2, 3, 4, special, ids[5:], (ids % 3 == 0) & ~special, (ids % 7 == 0) & ~special)


def vocabulary_file(home: Path) -> Path | None:
    """Where a directory keeps its vocabulary; None: it has none."""
    return next((home / name for name in VOCABULARIES if (home / name).exists()), None)


class Tokenizer(abc.ABC):
    """What every command needs of a tokenizer. `load` reads each kind: sentencepiece (`.model`), a published vocabulary
    (`tokenizer.json`, data/published.py), those of translators (data/piece_files.py).

    One set of special tokens serves both families: `bos` opens a document (BERT's [CLS]) and `eos` closes it
    ([SEP]). `[MASK]` in a text is the mask token, where there is one.
    """

    pad: int
    unk: int
    bos: int
    eos: int
    mask: int | None
    opening: tuple[int, ...] = ()
    """What stands before a prompt that is to be continued."""
    special: list[int]
    """Ids that stand for no text: never masked, never drawn as random replacements."""
    fingerprint: str
    chat_template: str = ""
    """How a conversation is written (data/chat.py), in jinja2; empty where the vocabulary says none."""

    def frame(self, pair: bool) -> tuple[list[int], list[int], list[int]]:
        """What stands before, between (of a pair) and behind the texts of a task's item."""
        return [self.bos], [self.eos] if pair else [], [self.eos]

    def framing_as_published(self) -> "Tokenizer":
        """The same tokenizer, whose `frame` is what a published vocabulary itself puts around texts."""
        return self

    @property
    def of_targets(self) -> "Tokenizer":
        """What encodes the targets of an encoder-decoder, into the same ids."""
        return self

    @property
    def target_start(self) -> tuple[int, ...]:
        """What an encoder-decoder reads before the first token of a target."""
        return (self.bos,)

    def around_source(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and behind a source."""
        return self.opening, (self.eos,)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text to ids, without bos or eos."""

    @abc.abstractmethod
    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """(id, first character, end) of every token; the bytes of one character share its place."""

    def encode_marked(self, text: str, marks: dict[str, int]) -> list[tuple[int, int, int]]:
        """The same of a text in which these strings are special tokens."""
        found, at = [], 0
        for part in re.split(f"({'|'.join(map(re.escape, marks))})", text):
            if part in marks:
                found.append((marks[part], at, at + len(part)))
            elif part:
                found += [(token, at + begin, at + end) for token, begin, end in self.encode_with_offsets(part)]
            at += len(part)
        return found

    @abc.abstractmethod
    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, [tokens] int32."""
        return [np.array(ids, np.int32) for ids in self.encode_many(texts)]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Special tokens other than [MASK] say nothing; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def piece(self, token: int) -> str:
        """How one token reads: its text, or its name in brackets."""

    @abc.abstractmethod
    def is_byte(self, token: int) -> bool:
        """Whether the token is part of a character only."""

    @abc.abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """[V] how many UTF-8 bytes of text each token stands for."""

    def role_ids(self) -> dict[str, int]:
        """Which token plays which part, by the names of `transformers`."""
        roles = ("pad", "bos", "eos", "cls", "sep")
        return dict(zip(roles, (self.pad, *(self.bos, self.eos) * 2), strict=True))

    @abc.abstractmethod
    def save_in(self, home: Path) -> None:
        """Write the files that `load` reads into a directory."""

    def vocabulary(self) -> Vocabulary:
        special = np.zeros(len(self), bool)
        special[self.special] = True
        pieces = [self.piece(i) for i in range(len(self))]
        return Vocabulary(
            self.pad,
            self.bos,
            self.eos,
            self.mask,
            special,
            np.flatnonzero(~special),
            np.array([not (p[:1].isalnum() or p[:1] == "'" or self.is_byte(i)) for i, p in enumerate(pieces)]),
            np.array([p.endswith(("\n", ".", "!", "?")) for p in pieces]) & ~special,
            self.target_start,
            self.around_source(),
        )

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        """The tokenizer in a file, or the one that a run directory holds. Raises InputError if it is none."""
        path = vocabulary_file(path) or path / VOCABULARIES[1] if path.is_dir() else path
        from bothways.data.piece_files import KINDS

        if path.name in KINDS:
            return KINDS[path.name].read(path)
        if path.suffix == ".json":
            from bothways.data.published import PublishedTokenizer

            return PublishedTokenizer.read(path)
        return SentencePieceTokenizer.read(path)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model that loses nothing: decode(encode(text)) == text."""

    def __init__(self, model: bytes):
        self.model = model
        self.sp = spm.SentencePieceProcessor(model_proto=model)
        self.pad, self.unk, self.bos, self.eos = 0, 1, 2, 3
        self.mask = self.sp.piece_to_id(MASK)

    def __len__(self) -> int:
        return self.sp.get_piece_size()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()[:16]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """[V] bytes of each token as it is written."""
        lengths = self.byte_lengths()
        lengths[self.mask] = len(MASK)
        return lengths

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0] if SPACE in text else self.sp.encode(text)

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        raw = np.frombuffer(text.encode(), np.uint8)
        first_bytes = np.append((raw & 0xC0) != 0x80, True)  # not in the middle of a character
        character = np.cumsum(first_bytes) - 1
        found, begin = [], 0
        for token in self.encode(text):
            end = begin + int(self._lengths[token])
            found.append((token, int(character[begin]), int(character[end - 1]) + 1))
            begin = end
        return found

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """sentencepiece writes a space as U+2581, so a text's own U+2581 would come back as a space: it is given in bytes."""
        if not any(SPACE in text for text in texts):
            return self.sp.encode(texts, num_threads=threads())
        parts = [text.split(SPACE) for text in texts]
        encoded = iter(self.sp.encode([part for each in parts for part in each], num_threads=threads()))
        own = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        found = []
        for each in parts:
            ids = next(encoded)
            for _ in each[1:]:
                ids = [*ids, *own, *next(encoded)]
            found.append(ids)
        return found

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if any(SPACE in text for text in texts):
            return super().encode_arrays(texts)
        return self.sp.encode(texts, num_threads=threads(), return_type="numpy")  # in two thirds of the time of lists

    def decode(self, ids: Iterable[int]) -> str:
        return self.sp.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        piece = self.sp.id_to_piece(int(token))
        return piece.replace(SPACE, " ")

    @property
    def special(self) -> list[int]:
        return [self.pad, self.unk, self.bos, self.eos, self.mask]

    def is_byte(self, token: int) -> bool:
        return self.sp.is_byte(token)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(len(self), np.int64)
        for i in range(len(self)):
            if self.sp.is_byte(i):
                lengths[i] = 1
            elif i not in self.special:
                lengths[i] = len(self.piece(i).encode())
        return lengths

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.model)

    def save_in(self, home: Path) -> None:
        self.save(home / "tokenizer.model")
        if self.chat_template:
            (home / CONFIG).write_text(json.dumps({"chat_template": self.chat_template}, ensure_ascii=False), "utf-8")

    @classmethod
    def read(cls, path: Path) -> "SentencePieceTokenizer":
        """Raises InputError if there is no such file, it is no sentencepiece model, or it lacks the specials."""
        try:
            tokenizer = cls(path.read_bytes())
            if (path.parent / CONFIG).exists():
                from bothways.data.vocabulary_files import template_in

                tokenizer.chat_template = template_in(json.loads((path.parent / CONFIG).read_text("utf-8")))
        except json.JSONDecodeError as e:
            raise InputError(f"{path.parent / CONFIG} is not JSON: {e}") from e
        except OSError as e:
            raise InputError(f"cannot read the tokenizer {path}: {e.strerror}") from e
        except RuntimeError as e:
            raise InputError(f"{path} is not a sentencepiece model") from e
        wanted = [PAD, UNK, BOS, EOS]
        got = [tokenizer.sp.id_to_piece(i) for i in range(min(4, len(tokenizer)))]
        if got != wanted or tokenizer.mask == tokenizer.unk:
            raise InputError(
                f"{path} does not begin with {' '.join(wanted)} and hold {MASK} (it begins with {' '.join(got)}); "
                "train one with `--data.tokenizer unigram`"
            )
        return tokenizer


def lines(texts: Iterable[str], share: float = 1.0, most: int | None = None) -> Iterator[str]:
    """What a vocabulary is trained on: the lines of the texts, long ones in parts.

    Args:
      share: of the lines that are taken, drawn evenly over all texts and always the same ones.
      most: bytes of them; by default TRAINING_BYTES.
    """
    budget, number = TRAINING_BYTES if most is None else most, 0
    for text in texts:
        for line in filter(None, re.split(f"[\n{SPACE}]", text)):
            for part in parts_of(line):
                number += 1
                if share < 1 and splitmix64(np.array([number], np.uint64))[0] >= share * 2.0**64:
                    continue
                budget -= len(part.encode())
                if budget < 0:
                    return
                yield part


def parts_of(line: str) -> Iterator[str]:
    """A line in parts of at most LONGEST_LINE characters, cut before a space where there is one in the second half."""
    while len(line) > LONGEST_LINE:
        cut = line.rfind(" ", LONGEST_LINE // 2, LONGEST_LINE)
        cut = cut if cut > 0 else LONGEST_LINE
        yield line[:cut]
        line = line[cut:]
    yield line


def train(texts: Iterable[str], kind: str, vocab_size: int, share: float = 1.0) -> SentencePieceTokenizer:
    """`train_on` a share of the lines of texts."""
    return train_on(lines(texts, share), kind, vocab_size)


def train_on(sentences: Iterator[str], kind: str, vocab_size: int) -> SentencePieceTokenizer:
    """Learn a sentencepiece vocabulary, byte for byte the same each time.

    Raises:
      InputError: the text does not allow so many pieces, or is too little to learn from.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            user_defined_symbols=[MASK, "\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=1.0 if kind == "char" else 0.9995,
            hard_vocab_limit=kind != "char",
            max_sentence_length=1_000_000,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as e:
        message = str(e)
        most = re.search(r"value <= (\d+)", message)
        if most:
            raise InputError(
                f"data.vocab_size is {vocab_size}, but this text allows at most {most[1]} {kind} pieces; "
                f"set --data.vocab-size {most[1]} or less, or give more text"
            ) from e
        least = re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message)
        if least or "required_chars" in message or "(vocab_size) >= (0)" in message:
            raise InputError(
                f"data.vocab_size is {vocab_size}, too small for the characters and 256 bytes that must be in it"
                + (f" ({least[2]})" if least else "")
            ) from e
        if "sentences_.empty()" in message:
            raise InputError(
                f"no {kind} vocabulary of {vocab_size} pieces can be trained: the text has nothing but line breaks"
            ) from e
        raise InputError(
            f"no {kind} vocabulary of {vocab_size} pieces can be learned from this text: {message[:200]}"
        ) from e
    return SentencePieceTokenizer(model.getvalue())
