"""Directories of sentence-transformers: modules.json says what turns a body's features into a vector.

modules.json                        Transformer, Pooling and maybe Normalize, in this order
1_Pooling/config.json               mean, first or last token
config_sentence_transformers.json   prompts by name
sentence_bert_config.json           how many tokens of a text are read
"""

import json
from pathlib import Path

from bothways.convert.files import read_json
from bothways.embedding import EmbeddingInfo
from bothways.errors import InputError

POOLS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
OLD = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
"""Before version 6 each pooling had a key of its own."""
MODULES = "modules.json"


def body_of(home: Path) -> Path:
    """Where the body lies: the directory itself, or a folder in it that modules.json names."""
    if not (home / MODULES).is_file():
        return home
    folder = _modules(home)[0][1]
    if Path(folder).name != folder:
        raise InputError(f"{home / MODULES} names a folder outside its directory: {folder}")
    return home / folder


def read(home: Path) -> EmbeddingInfo | None:
    """How a directory makes vectors; None where it has no modules.json.

    Raises:
      InputError: a module or a pooling that is not computed here.
    """
    if not (home / MODULES).is_file():
        return None
    kinds = _modules(home)
    if [kind for kind, _ in kinds] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{home / MODULES} lists {', '.join(kind for kind, _ in kinds)}; "
            "there are Transformer, Pooling and maybe Normalize, in this order"
        )
    pooling = read_json(home / kinds[1][1] / "config.json")
    active = pooling.get("pooling_mode") or [k for k, on in pooling.items() if k.startswith("pooling_mode_") and on]
    active = [OLD.get(name, name) for name in ([active] if isinstance(active, str) else active)]
    if len(active) != 1 or active[0] not in POOLS:
        raise InputError(f"{home / kinds[1][1]} pools by {', '.join(active) or 'nothing'}; there are {', '.join(POOLS)}")
    if not pooling.get("include_prompt", True):
        raise InputError(f"{home / kinds[1][1]} leaves the prompt out of the mean; that is not supported")
    settings, length = home / "config_sentence_transformers.json", home / kinds[0][1] / "sentence_bert_config.json"
    said = read_json(settings) if settings.is_file() else {}
    transformer = read_json(length) if length.is_file() else {}
    if transformer.get("do_lower_case"):
        raise InputError(f"{length} lowers capitals before the vocabulary does (do_lower_case); that is not supported")
    most = transformer.get("max_seq_length") or 0
    prompts = {str(name): str(text) for name, text in (said.get("prompts") or {}).items() if text}
    chosen = said.get("default_prompt_name") or ""
    return EmbeddingInfo(
        POOLS[active[0]],
        normalize=len(kinds) == 3,
        length=int(most),
        prompts=prompts,
        similarity=said.get("similarity_fn_name") or "cosine",
        default_prompt=chosen if chosen in prompts else "",
    )


def _modules(home: Path) -> list[tuple[str, str]]:
    """(kind, folder) of every module."""
    try:
        listed = json.loads((home / MODULES).read_text())
        found = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in listed]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{home / MODULES} cannot be read: {type(e).__name__} {e}") from e
    if not found:
        raise InputError(f"{home / MODULES} lists no module")
    return found


def write(home: Path, info: EmbeddingInfo, width: int) -> None:
    """Put these files beside an exported body of this width."""
    names = ["Transformer", "Pooling", *(["Normalize"] if info.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    pool = next(theirs for theirs, ours in POOLS.items() if ours == info.pool)
    pooling = {"word_embedding_dimension": width} | {key: mode == pool for key, mode in OLD.items()}
    settings = {
        "prompts": info.prompts,
        "default_prompt_name": info.default_prompt or None,
        "similarity_fn_name": info.similarity,
    }
    files = {
        MODULES: modules,
        "1_Pooling/config.json": pooling,
        "config_sentence_transformers.json": settings,
        "sentence_bert_config.json": {"max_seq_length": info.length or None, "do_lower_case": False},
    }
    for name, content in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(json.dumps(content, indent=2) + "\n")
