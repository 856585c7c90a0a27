"""A run leaves as one GGUF file, which llama.cpp opens."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bothways import rundir
from bothways.convert import check, gguf_file
from bothways.convert.family import INITIAL
from bothways.convert.fitting import coming, going, origin_of
from bothways.convert.stored import DTYPES, room_for
from bothways.embedding import read_embedding
from bothways.errors import InputError
from bothways.model.config import TransformerConfig


def export_gguf(home: Path, path: Path, log: Any, embeds: str, type_: str) -> tuple[str, str, int, float | None]:
    """Write a run as a GGUF file, and read it back: the difference is that of its logits from the run's.

    Raises:
      InputError: something is at `path`, or llama.cpp computes no such run, or it is fine-tuned.
    """
    if path.exists():
        raise InputError(f"{path} exists already; give another name, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = origin_of(home).get("dtype", "float32")
    with room_for(path, DTYPES[kept]) as allocate, room_for(path, DTYPES["float32"]) as read_back:
        run = rundir.load_run(home, log, dtype="" if kept == "float32" else kept, into=allocate)
        if run.task is not None:
            raise InputError(f"{home} is fine-tuned, and llama.cpp reads no heads of labels; export it to a directory")
        out = going(run, jax.device_get(run.params), log)
        if out.family is None:
            raise InputError(
                f"llama.cpp computes published families only, and {home} fits none; export it to a directory"
            )
        said = read_embedding(home)
        pool = embeds or (said.pool if said else "mean" if out.recipe.family == "bert" else "")
        partial = path.with_name(f".{path.name}.partial.gguf")
        try:
            model = out.recipe.model
            gguf_file.write(partial, out.family.name, out.config, out.tensors, run.tokenizer, model, type_, pool, log)
            back = coming(gguf_file.read(partial), home.name)
            if lost := _differences(model, back.recipe.model):
                raise InputError(
                    f"a GGUF file cannot say what this run computes: {', '.join(lost)}; export it to a directory"
                )
            tokens = check.fixed_tokens(run.tokenizer, back.recipe.model.context_length)
            params = back.params(read_back)
            head = back.recipe.model.masked_head  # of a BERT, llama.cpp has the body only
            features = dataclasses.replace(out.recipe, model=dataclasses.replace(out.recipe.model, masked_head=head))
            got = check.our_logits(back.recipe, params, tokens)
            wanted = check.our_logits(features, out.params, tokens)
            exact = type_ == "float32"  # of the others the difference is what their rounding does
            largest = check.difference(got, wanted) if exact else float(np.abs(got - wanted).max())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return str(path), out.family.name, sum(t.size for t in back.tensors.values()), largest


def _differences(mine: TransformerConfig, theirs: TransformerConfig) -> list[str]:
    """Fields that a file gave back otherwise, those aside that llama.cpp does without; floats are float32 there."""
    aside = (*INITIAL, "masked_head", "next_sentence", "pooler", "dropout_embed", "dropout_attention", "dropout_residual")
    pairs = {
        f.name: (getattr(mine, f.name), getattr(theirs, f.name))
        for f in dataclasses.fields(TransformerConfig)
        if f.name not in aside
    }
    same = {name: np.float32(a) == np.float32(b) if isinstance(a, float) else a == b for name, (a, b) in pairs.items()}
    return [f"{name} is {pairs[name][0]}, and comes back as {pairs[name][1]}" for name in pairs if not same[name]]
