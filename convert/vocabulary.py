"""The vocabulary of a run, as `transformers.AutoTokenizer` and the engines that read tokenizer.json open it."""

import json
from pathlib import Path

import tokenizers

from bothways.data.tokenizer import SentencePieceTokenizer, Tokenizer
from bothways.data.vocabulary_files import from_sentencepiece
from bothways.errors import InputError
from bothways.rundir import TaskInfo


def save_vocabulary(tokenizer: Tokenizer, home: Path, ours: str, task: TaskInfo | None = None) -> None:
    """Write the vocabulary into an exported directory: tokenizer.json, tokenizer_config.json, and what the import reads.

    Args:
      ours: our family, which decides what stands around a text: [CLS] and [SEP] in a BERT, [SEP] behind the source of
        an encoder-decoder, nothing around what a GPT continues.
      task: what a run was fine-tuned for: its texts are wrapped as fine-tuning wraps them.
    """
    tokenizer.save_in(home)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        if task is not None and task.wrap == "task":
            if not (home / "tokenizer.json").exists():
                raise InputError(
                    "texts of this run are wrapped as fine-tuning wraps them, which a vocabulary without a tokenizer.json "
                    "(Marian's, M2M-100's) cannot say; such a fine-tuned run does not leave"
                )
            _wrap_as_task(tokenizer, home / "tokenizer.json")
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
    around |= {"gpt": (f"{bos} $A {eos}", f"{bos} $A {eos} $B {eos}")} if task is not None else {}
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


def _wrap_as_task(tokenizer: Tokenizer, path: Path) -> None:
    """A published vocabulary puts around texts what fine-tuning put there, if it does not already."""
    fast = tokenizers.Tokenizer.from_file(str(path))
    bos, eos = (fast.id_to_token(i) for i in (tokenizer.bos, tokenizer.eos))
    wanted = [tokenizer.bos, tokenizer.eos], [tokenizer.bos, tokenizer.eos, tokenizer.eos]
    if (fast.encode("").ids, fast.encode("", "").ids) == wanted:
        return
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B:1 {eos}:1",
        special_tokens=[(bos, tokenizer.bos), (eos, tokenizer.eos)],
    )
    fast.save(str(path))
