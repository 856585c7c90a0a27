"""How byte-level vocabularies cut a text before they merge bytes, by llama.cpp's names and by the classes of `transformers`."""

import tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
AS_GPT2 = "GPT2 Roberta Bart Longformer LED Mvp Blenderbot Whisper CodeGen Deberta Luke"
CUT_OF_CLASS = {f"{name}Tokenizer": "gpt-2" for name in AS_GPT2.split()} | {
    "Qwen2Tokenizer": "qwen2",
    "DreamTokenizer": "qwen2",
}
"""Of classes whose files are vocab.json and merges.txt. Such a file does not say how texts are cut."""


def splitting(cut: str, prefix_space: bool = False) -> tokenizers.pre_tokenizers.PreTokenizer:
    """One of CUTS. With prefix_space a text begins with a space."""
    pre = tokenizers.pre_tokenizers
    if cut == "gpt-2":
        return pre.ByteLevel(add_prefix_space=prefix_space)
    if cut == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=prefix_space)])
    split = pre.Split(tokenizers.Regex({"llama-bpe": LLAMA3, "qwen2": QWEN2}[cut]), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=prefix_space, use_regex=False)])


def normalizer(cut: str) -> tokenizers.normalizers.Normalizer | None:
    """What a text goes through first: Qwen 2 composes letters and their accents."""
    return tokenizers.normalizers.NFC() if cut == "qwen2" else None
