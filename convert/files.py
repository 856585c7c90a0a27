"""Checkpoints as files: a Hugging Face directory, a hub name, a GGUF file. No pickle is ever opened."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bothways.convert.family import check_types
from bothways.convert.stored import Stored
from bothways.data.piece_files import KINDS, NUMBERS, MarianPieces
from bothways.data.published import PublishedTokenizer
from bothways.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from bothways.embedding import EmbeddingInfo
from bothways.errors import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HOW_TO_CONVERT = (
    "is a pickle, which can run any code when it is opened; bothways opens none. Convert it where you trust it: "
    "`transformers.AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)` writes safetensors"
)
WEIGHTS = "model.safetensors"
REFERENCE = "bothways_reference.safetensors"
"""Logits on a fixed text, stored by `bothways export` beside the weights."""
TRAINED_HERE = re.compile(b".{,8}" + b".{,16}".join(re.escape(p.encode()) for p in (PAD, UNK, BOS, EOS)), re.DOTALL)
"""How sentencepiece models begin that were trained here. One beside another's tokenizer.json, such as Llama's, is not read."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read: its configuration, its tensors under their own names, its vocabulary."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    tokenizer: Tokenizer
    embedding: EmbeddingInfo | None = None
    """How it makes vectors, where it is a directory of sentence-transformers, or a GGUF file that says it."""


def read(source: str) -> Checkpoint:
    """A checkpoint by its path or its name on the hub.

    Raises:
      InputError: nothing there, only pickles, or a file that is damaged; says which.
    """
    path = Path(source).expanduser()
    if path.suffix in PICKLES:
        raise InputError(f"{path} {HOW_TO_CONVERT}")
    if path.suffix == ".gguf":
        from bothways.convert import gguf_file

        return gguf_file.read(path)
    if not path.exists():
        path = _download(source)
    if not path.is_dir():
        raise InputError(f"{path} is neither a directory with a config.json nor a .gguf file")
    from bothways.convert import sentence

    return dataclasses.replace(_read_directory(sentence.body_of(path)), embedding=sentence.read(path))


def _read_directory(home: Path) -> Checkpoint:
    if not (home / "config.json").is_file():
        raise InputError(f"{home} has no config.json; give a directory as `save_pretrained` writes it, or a .gguf file")
    files = weight_files(home)
    config = read_json(home / "config.json")
    check_types(config, {})
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, tensor in stored_tensors(file).items():
            if name in tensors:
                raise InputError(f"{name} is in {file.name} and in another file of {home}")
            tensors[name] = tensor
    return Checkpoint(home, config, tensors, _tokenizer(home, config))


def _tokenizer(home: Path, config: dict[str, Any]) -> Tokenizer:
    ours = home / "tokenizer.model"
    if ours.exists() and TRAINED_HERE.match(ours.read_bytes()):
        return Tokenizer.load(ours)  # of an exported run, whose tokenizer.json has another fingerprint
    pieces = [kind for first, kind in KINDS.items() if (home / first).exists()]
    if pieces and not (home / "tokenizer.json").exists():
        if (home / NUMBERS).exists() or pieces[0] is MarianPieces:
            return pieces[0].read(home / pieces[0].files[0], config)
        if config.get("model_type") == "m2m_100":
            raise InputError(
                f"{home} has {pieces[0].files[0]} alone, in which no language has a number: put {NUMBERS} beside it (M2M-100), "
                "or tokenizer.json (NLLB); they lie on the hub with the same model's weights"
            )
    return PublishedTokenizer.read(home / "tokenizer.json", config)


def weight_files(home: Path) -> list[Path]:
    """The safetensors of a checkpoint directory. Raises InputError if there are none, or a shard is missing."""
    index = home / "model.safetensors.index.json"
    if (home / WEIGHTS).exists():
        return [home / WEIGHTS]
    if index.exists():
        shards = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise InputError(f"{index} names files outside its directory: {', '.join(outside)}")
        absent = [name for name in shards if not (home / name).is_file()]
        if absent or not shards:
            raise InputError(f"{index} names files that are not there: {', '.join(absent) or 'none at all'}")
        return [home / name for name in shards]
    pickles = sorted(p.name for p in home.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(f"{home / pickles[0]} {HOW_TO_CONVERT}")
    raise InputError(f"{home} has no {WEIGHTS}")


def read_json(path: Path) -> dict[str, Any]:
    """Raises InputError for what is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be read: {e}") from e
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, each read when it is wanted. Raises InputError if the file is damaged."""

    def one(name: str) -> np.ndarray:
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as e:
        raise InputError(
            f"{path} cannot be read ({e}); it is {path.stat().st_size:,} bytes long: is it whole? Download it again"
        ) from e
    return {name: Stored(shape, functools.partial(one, name)) for name, shape in shapes.items()}


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise InputError(f"{name} is no directory here; to fetch it from the hub, `pip install huggingface_hub`") from e
    wanted = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        *(name for kind in KINDS.values() for name in kind.files),
    ]
    others = ["*/*.safetensors", "onnx/*", "openvino/*", "original/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=others))
    except Exception as e:  # the library and its network raise many kinds
        reason = str(e).strip().split("\n")[0][:200]
        raise InputError(
            f"{name} is no directory here, and fetching it from the hub failed ({type(e).__name__}: {reason}); "
            "fetch it where there is a network and give the directory"
        ) from e
