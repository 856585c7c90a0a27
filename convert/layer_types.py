"""What config.json says of each layer: whether it sees all tokens or a window, and its rotary base (Gemma 3, ModernBERT)."""

from bothways.convert.family import Config, shortest_pattern
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

KINDS = {"full_attention": "global", "sliding_attention": "local"}


def pattern(theirs: Config, every: int, last: bool) -> tuple[str, ...]:
    """The layers' kinds as `layer_types` lists them; without it each `every`-th is global, the last of them or the first."""
    n, first = theirs["num_hidden_layers"], every - 1 if last else 0
    usual = ["full_attention" if i % every == first else "sliding_attention" for i in range(n)]
    return shortest_pattern([KINDS[kind] for kind in theirs.get("layer_types") or usual])


def types(cfg: TransformerConfig) -> list[str]:
    """`layer_types`. Raises InputError for layers of a kind that these models have not."""
    names = {ours: theirs for theirs, ours in KINDS.items()}
    if "nope" in cfg.layer_pattern:
        raise InputError("layers without positions, which it has not")
    return [names[cfg.layer_pattern[i % len(cfg.layer_pattern)]] for i in range(cfg.n_layers)]


def rotary_bases(theirs: Config, old: tuple[str, str], default: tuple[float, float]) -> Config:
    """Our rotary bases from `rope_parameters` by kind, or from the older keys, those of global and of local layers.

    Raises:
      InputError: positions are stretched.
    """
    found = theirs.get("rope_parameters") or {}
    found = found if KINDS.keys() & found.keys() else {"full_attention": found}
    for values in (*found.values(), theirs.get("rope_scaling")):
        if values and values.get("rope_type", values.get("type", "default")) != "default":
            raise InputError(f"config.json: rotary scaling is not supported in this family: {values}")
    given = [(found.get(kind) or {}).get("rope_theta") for kind in KINDS]
    bases = [float(g or theirs.get(o) or d) for g, o, d in zip(given, old, default, strict=True)]
    return dict(zip(("rotary_base", "rotary_base_local"), bases, strict=True))


def rope_parameters(cfg: TransformerConfig) -> Config:
    """`rotary_bases` backwards. Raises InputError where positions are stretched."""
    if cfg.rotary_scaling.kind != "none":
        raise InputError("rotary scaling, which it has not")
    bases = (cfg.rotary_base, cfg.rotary_base_local or cfg.rotary_base)
    return {kind: {"rope_theta": base, "rope_type": "default"} for kind, base in zip(KINDS, bases, strict=True)}
