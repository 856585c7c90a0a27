"""The vocabulary of a run, as `transformers.AutoTokenizer` and the engines that read tokenizer.json open it."""

import json
from pathlib import Path

import tokenizers

from bothways.data.tokenizer import SentencePieceTokenizer, Tokenizer
from bothways.data.vocabulary_files import from_sentencepiece


def save_vocabulary(tokenizer: Tokenizer, home: Path, ours: str) -> None:
    """Write the vocabulary into an exported directory: tokenizer.json, tokenizer_config.json, and what the import reads.

    Args:
      ours: our family, which decides what stands around a text: [CLS] and [SEP] in a BERT, [SEP] behind the source of
        an encoder-decoder, nothing around what a GPT continues.
    """
    tokenizer.save_in(home)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    sp, special = tokenizer.sp, [tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos]
    fast = from_sentencepiece(sp, special, [i for i in (tokenizer.mask, sp.piece_to_id("\n")) if i not in special])
    pad, unk, bos, eos = (sp.id_to_piece(i) for i in special)
    roles = {"pad": pad, "unk": unk, "bos": bos, "eos": eos}
    if ours == "bert":
        roles |= {"cls": bos, "sep": eos, "mask": sp.id_to_piece(tokenizer.mask)}
    around = {
        "bert": (f"{bos}:0 $A:0 {eos}:0", f"{bos}:0 $A:0 {eos}:0 $B:1 {eos}:1"),
        "seq2seq": (f"$A {eos}", f"$A {eos} $B {eos}"),
    }
    if ours in around:
        single, pair = around[ours]
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(bos, tokenizer.bos), (eos, tokenizer.eos)]
        )
    settings = {f"{role}_token": token for role, token in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *(["token_type_ids"] if ours == "bert" else []), "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    fast.save(str(home / "tokenizer.json"))
    (home / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
