"""GGUF, the file format of llama.cpp: read as the checkpoint that it was made from, and written from one.

The tables of convert/gguf_architectures.py rename tensors and configuration values in both directions; what is left to say is in
a few words of code: llama.cpp pairs rotary features otherwise for `llama`, adds 1 to Gemma's norms, and keeps scaling as factors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bothways.convert import gguf_vocabulary
from bothways.convert.family import Config
from bothways.convert.files import Checkpoint
from bothways.convert.gguf_architectures import ARCHITECTURES, Architecture
from bothways.convert.stored import Stored
from bothways.data.tokenizer import Tokenizer
from bothways.embedding import EmbeddingInfo
from bothways.errors import InputError
from bothways.model.config import RotaryScaling, TransformerConfig
from bothways.model.layers import rotary_frequencies

TYPES = ("float32", "float16", "bfloat16", "q8_0")
"""What matrices are written as; vectors are always float32."""
BLOCK = 32
"""Numbers that share a scale in Q8_0; a matrix whose rows are no multiple of it is written as float16."""


WRITTEN_AS = {"mistral": "llama"}
"""Families that llama.cpp knows under another's name."""
POOLS: dict[int, Literal["mean", "cls", "last"]] = {1: "mean", 2: "cls", 3: "last"}
"""llama.cpp's numbers of poolings."""
LLAMA3_ORIGINAL = tuple(2**n for n in range(9, 18))


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as e:
        raise InputError(f"{path} is a GGUF file; for it, `pip install gguf`") from e
    return gguf


# ---- in ---------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Checkpoint:
    """A checkpoint of one of ARCHITECTURES, whose tensors are dequantised as they are read.

    Raises:
      InputError: no such file, damaged, of another architecture, or the package gguf is not installed.
    """
    gguf = _gguf(path)
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        reader = gguf.GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OSError, MemoryError) as e:
        raise InputError(
            f"{path} cannot be read ({type(e).__name__}: {e}); it is {path.stat().st_size:,} bytes long: is it whole?"
        ) from e
    kind = said.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InputError(f"{path} holds a {kind!r}; of GGUF files there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    found = {t.name: _stored(gguf, path, t) for t in reader.tensors}
    factors = found.pop("rope_freqs.weight", None)
    config = {theirs: said[_key(kind, key)] for key, theirs in architecture.config.items() if _key(kind, key) in said}
    config = {key: value for key, value in config.items() if not (key == "sliding_window" and value == 0)}
    config |= architecture.means(config) | {"model_type": architecture.family}
    if "output" in architecture.stems:
        config["tie_word_embeddings"] = "output.weight" not in found
    if "token_embd.weight" in found:
        config["vocab_size"] = found["token_embd.weight"].shape[0]
    config |= _scaling_read(said, kind, factors, config, path)
    if "num_key_value_heads" in architecture.config.values():  # optional: without it every head has keys of its own
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads")}
    renamed = {}
    for name, tensor in found.items():
        parts = name.split(".")  # token_embd.weight, or blk.7.attn_q.weight
        stem, layer = parts[-2], parts[1] if parts[0] == "blk" else ""
        if architecture.paired and heads.get(stem):
            tensor = tensor.then(_halves, heads[stem])
        if architecture.norms_from_one and stem.endswith("norm"):
            tensor = tensor.then(np.subtract, np.float32(1))
        if architecture.stems.get(stem, "").endswith(architecture.transposed or "-") and parts[-1] == "weight":
            tensor = tensor.then(np.transpose)
        renamed[f"{architecture.stems.get(stem, stem).format(layer)}.{parts[-1]}"] = tensor
    return Checkpoint(path, config, renamed, gguf_vocabulary.read(said, path), _embedding(said, kind, path))


def _embedding(said: Config, kind: str, path: Path) -> EmbeddingInfo | None:
    """How a file says that vectors are made; None where it says nothing, or that each token keeps its own.

    Raises:
      InputError: a pooling that is not computed here, such as a reranker's.
    """
    number = said.get(f"{kind}.pooling_type", 0)
    if number != 0 and number not in POOLS:
        there = ", ".join(f"{n} {pool}" for n, pool in POOLS.items())
        raise InputError(f"{path}: pooling_type is {number}; there are {there} (4 is a reranker's)")
    return EmbeddingInfo(POOLS[number]) if number else None


def _key(kind: str, key: str) -> str:
    return key if key.startswith("tokenizer.") else f"{kind}.{key}"


def _stored(gguf: Any, path: Path, tensor: Any) -> Stored:
    def values() -> np.ndarray:
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise InputError(f"{path}: {e} in the package gguf; give a file in another quantisation, such as Q8_0") from e

    return Stored(tuple(int(n) for n in reversed(tensor.shape)), values)


def _halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix: llama.cpp pairs feature 2k with 2k + 1 for its rotary positions, we k with k + K/2."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _pairs(tensor: np.ndarray, heads: int) -> np.ndarray:
    """`_halves` backwards."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _scaling_read(said: Config, kind: str, factors: Stored | None, config: Config, path: Path) -> Config:
    """rope_scaling of config.json; empty where positions are not stretched."""
    scaling = said.get(f"{kind}.rope.scaling.type", "none")
    if factors is not None:
        return {"rope_scaling": _llama3_of(np.asarray(factors), config, path)}
    if scaling == "none":
        return {}
    if scaling not in ("linear", "yarn"):
        raise InputError(f"{path} has rotary scaling of the kind {scaling!r}; there are linear and yarn")
    found = {"rope_type": scaling, "factor": said[f"{kind}.rope.scaling.factor"]}
    original = said.get(f"{kind}.rope.scaling.original_context_length")
    return {"rope_scaling": found | ({"original_max_position_embeddings": original} if scaling == "yarn" else {})}


def _llama3_of(factors: np.ndarray, config: Config, path: Path) -> Config:
    """Llama 3's scaling by the factors that it gives each pair, of which a file holds nothing else."""
    width, base = 2 * factors.size, float(config.get("rope_theta", 10_000.0))
    for original in LLAMA3_ORIGINAL:
        scaling = RotaryScaling("llama3", float(factors.max()), original, 1.0, 4.0)
        if np.allclose(_factors(scaling, width, base), factors, rtol=1e-3):
            ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": original} | ramp
    raise InputError(f"{path} stretches rotary positions in a way that is not Llama 3's; import the original checkpoint")


def _factors(scaling: RotaryScaling, width: int, base: float) -> np.ndarray:
    """What each pair's angle is divided by."""
    return rotary_frequencies(width, base, RotaryScaling())[0] / rotary_frequencies(width, base, scaling)[0]


# ---- out --------------------------------------------------------------------------------------------------------------


def architecture_for(family: str) -> str:
    """llama.cpp's name of a published family. Raises InputError where it has none that is known here."""
    known = {a.family: name for name, a in ARCHITECTURES.items()} | WRITTEN_AS
    if family not in known:
        raise InputError(f"a {family} does not leave as GGUF; {', '.join(known)} do. Export to a directory")
    return known[family]


def write(
    path: Path,
    family: str,
    config: Config,
    tensors: dict[str, Stored],
    tokenizer: Tokenizer,
    model: TransformerConfig,
    type_: str,
    pool: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Write a published checkpoint as a GGUF file.

    Args:
      config, tensors: as the family's own directory holds them.
      model: our configuration, resolved.
      type_: one of TYPES.
      pool: mean, cls or last, of what embeds texts.

    Raises:
      InputError: llama.cpp does not compute what this run does, or cuts texts otherwise.
    """
    gguf, name = _gguf(path), architecture_for(family)
    architecture = ARCHITECTURES[name]
    if name == "llama" and config.get("sliding_window"):
        raise InputError(f"llama.cpp gives a {family} no window, and this one's is {config['sliding_window']}")
    if model.position_embedding == "rotary":
        config = config | {"rope_theta": model.rotary_base, "head_dim": model.d_head}
    writer = gguf.GGUFWriter(path, name, use_temp_file=False)
    writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    for key, theirs in architecture.config.items():
        value = config.get(theirs)
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(_key(name, key), value)
    for key, value in architecture.said.items():
        writer.add_bool(_key(name, key), value)
    if pool:
        writer.add_pooling_type(gguf.PoolingType[pool.upper()])
    if "head_dim" in config:
        writer.add_uint32(f"{name}.rope.dimension_count", config["head_dim"])
    gguf_vocabulary.write(writer, tokenizer)
    written = _renamed(architecture, config, tensors, log) | _scaling_write(writer, name, model.rotary_scaling, config)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    plan = []
    for tensor_name, tensor in written.items():
        kind = gguf.GGMLQuantizationType[kinds[type_] if len(tensor.shape) > 1 else "F32"]
        if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % BLOCK:
            kind = gguf.GGMLQuantizationType.F16
        if tensor_name in ("position_embd.weight", "token_types.weight"):
            kind = gguf.GGMLQuantizationType.F32
        shape = (
            gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind == gguf.GGMLQuantizationType.Q8_0 else tensor.shape
        )
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}.get(kind.name, np.uint8)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = None if kind.name in ("F32", "F16") else kind
        writer.add_tensor_info(tensor_name, shape, np.dtype(dtype), size, raw_dtype=raw)
        plan.append((tensor, kind))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in plan:  # one at a time
            writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(np.asarray(tensor), np.float32), kind))
    finally:
        writer.close()


def _renamed(architecture: Architecture, config: Config, tensors: dict[str, Stored], log: Callable[[str], None]) -> dict:
    back = {theirs: name for name, theirs in architecture.stems.items()}
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads")}
    found, unread = {}, []
    for name, tensor in tensors.items():
        whole, _, end = name.rpartition(".")
        parts = whole.split(".")
        layer = next((part for part in parts if part.isdigit()), "")
        stem = back.get(".".join("{}" if part == layer else part for part in parts))
        if name.endswith(architecture.unread or "-") or (stem is None and name.startswith("cls.")):
            unread.append(name)
            continue
        if stem is None:
            raise InputError(f"llama.cpp has no place for {name}; export to a directory")
        if architecture.paired and heads.get(stem):
            tensor = tensor.then(_pairs, heads[stem])
        if architecture.norms_from_one and stem.endswith("norm"):
            tensor = tensor.then(np.add, np.float32(1))
        if architecture.stems[stem].endswith(architecture.transposed or "-") and end == "weight":
            tensor = tensor.then(np.transpose)
        found[f"{f'blk.{layer}.' if layer else ''}{stem}.{end}"] = tensor
    if unread:
        log(f"left out, since llama.cpp reads the features only: {', '.join(unread)}")
    return found


def _scaling_write(writer: Any, name: str, scaling: RotaryScaling, config: Config) -> dict[str, Stored]:
    """Puts rotary scaling into the file's values; Llama 3's is a tensor of factors, which is returned."""
    if scaling.kind == "llama3":
        factors = np.float32(_factors(scaling, config["head_dim"], float(config["rope_theta"])))
        return {"rope_freqs.weight": Stored(factors.shape, lambda: factors)}
    if scaling.kind != "none":
        if scaling.kind == "yarn" and (scaling.low, scaling.high, scaling.attention_factor) != (1.0, 32.0, 0.0):
            raise InputError(
                "llama.cpp's yarn has the ramp 1 to 32 and no attention factor of its own; export to a directory"
            )
        writer.add_string(f"{name}.rope.scaling.type", scaling.kind)
        writer.add_float32(f"{name}.rope.scaling.factor", scaling.factor)
        if scaling.kind == "yarn":
            writer.add_uint32(f"{name}.rope.scaling.original_context_length", scaling.original_context)
    return {}
