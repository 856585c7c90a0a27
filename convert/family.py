"""A way of publishing models: one table of tensors and one of configuration values, read in both directions."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from bothways.config import ObjectiveConfig
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

Config = dict[str, Any]
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
SWIGLU = {"silu": "swiglu"}
"""Of MLPs with a gate that goes through silu."""
INITIAL = ("init", "init_std", "init_residual", "dtype", "attention", "scan_layers", "remat")
"""Fields that a checkpoint says nothing of: how weights began, and how the program is laid out."""


OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""Norms' parameters as BERT's first checkpoints call them."""


OBJECTS = ("rope_parameters", "rope_scaling")
"""Keys of config.json that hold an object, or null."""
SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}


def check_types(theirs: Config, fields: dict[str, str]) -> None:
    """Whether values are of the JSON types that they must be: those that every family has, and those of these keys.

    Args:
      fields: a key of config.json -> our field that takes its value; of a family.

    Raises:
      InputError: one is not; says which, what it is, and what it must be.
    """
    names = theirs.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"config.json: architectures is {names!r}; it must be a list of names of classes")
    for key, value in theirs.items():
        several = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and not all(n is None or type(n) is int for n in several):
            raise InputError(f"config.json: {key} is {value!r}; it must be a whole number, a list of these, or null")
    if theirs.get("vocab_size") == 0:
        raise InputError("config.json: vocab_size is 0; it must be how many tokens there are")
    types = {f.name: type(f.default) for f in dataclasses.fields(TransformerConfig)}
    wanted = {key: types[ours] for key, ours in fields.items() if types[ours] in SAID} | dict.fromkeys(OBJECTS, dict)
    for key, want in wanted.items():
        value = theirs.get(key)
        # JSON's true is an int to Python, and 10000 is a float's value too.
        fits = isinstance(value, (int, float) if want is float else want) and (
            want is bool or not isinstance(value, bool)
        )
        if value is not None and not fits:
            raise InputError(f"config.json: {key} is {value!r}; it must be {SAID[want]}")


@dataclasses.dataclass(frozen=True)
class Head:
    """A task head as a family publishes it (convert/heads.py).

    Args:
      table: stems -> our modules of `task_head`.
      hidden, hidden_bias, hidden_norm: as TaskHead has them.
      pooler: it reads the body's pooler.
      bias: the output layer has one.
      prefix: of the body's names, where it is another than the family's.
      pool_key: of config.json, which says how a text's tokens are pooled; empty: one token is read.
      pools: our TaskModel.pool -> their word for it; the first is what a missing key means.
    """

    table: dict[str, str]
    hidden: str = ""
    hidden_bias: bool | None = None
    hidden_norm: bool = False
    pooler: bool = False
    bias: bool = True
    prefix: str = ""
    pool_key: str = ""
    pools: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"token": "cls"})


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of publishing a model.

    Args:
      name: `model_type` in config.json.
      ours: our family.
      constants: fields of TransformerConfig that are always so.
      values: their key -> our field, with the value that a config.json without the key means.
      wanted: their key -> the value it must have where it is there; a model with another is none that we compute.
      heads: our field -> the prefix of its tensors. The field is true where the checkpoint has such tensors.
      read: the fields that need more than a name: their config -> ours.
      write: the other direction.
      prefix: of the body's names in a checkpoint that has heads.
      copies: tensors that some checkpoints hold twice, and under which name they count.
      buffers: ends of names that hold no parameters.
      pad: the id that padding must have, where positions depend on it.
      classes: how names of its classes begin, such as Bert in BertForMaskedLM.
      paired: rotary positions turn features 2k and 2k + 1 together.
      tasks: its task heads, by the end of their classes' names.
      unused: ends of stems that a model of this configuration has not, where the layout has several for one module.
      objective: diffusion, of models that fill masks in whole rows; no class of `transformers` opens these. Empty: causal of a
        gpt, masked of a bert, pairs or spans of an encoder-decoder.
      untied: prefix of an output layer of its own; there is one where a checkpoint has it, whatever config.json says (T5).
    """

    name: str
    ours: Literal["gpt", "bert", "seq2seq"]
    layout: Layout
    constants: Config
    values: dict[str, tuple[str, Any]]
    wanted: Config
    heads: dict[str, str]
    read: Callable[[Config], Config]
    write: Callable[[TransformerConfig], Config]
    architecture: Callable[[TransformerConfig], str]
    prefix: str
    copies: dict[str, str]
    buffers: tuple[str, ...] = ()
    pad: int | None = None
    classes: str = ""
    paired: bool = False
    tasks: dict[str, Head] = dataclasses.field(default_factory=dict)
    unused: Callable[[TransformerConfig], tuple[str, ...]] = lambda cfg: ()
    untied: str = ""
    objective: Literal["", "diffusion"] = ""

    def layout_for(self, cfg: TransformerConfig) -> Layout:
        """The layout of a model of this configuration."""
        cfg = cfg.resolved()
        table = without(self.layout.table, *self.unused(cfg))
        return dataclasses.replace(
            self.layout, table=table, paired=(cfg.rotary_width or cfg.d_head) if self.paired else 0
        )

    def trained_by(self, objective: ObjectiveConfig) -> bool:
        """Whether a run with this objective may leave as this family."""
        if self.objective:
            return objective.kind == self.objective and set(objective.block_sizes) == {0}
        kinds = {
            "gpt": ("causal", "chat", "contrastive"),
            "bert": ("masked", "contrastive"),
            "seq2seq": ("pairs", "spans"),
        }
        return objective.kind in kinds[self.ours]

    def config(self, theirs: Config, names: Iterable[str]) -> TransformerConfig:
        """Our configuration, from theirs and the names of the tensors.

        Raises:
          InputError: a value is missing, is impossible, or makes another function than ours.
        """
        for key, want in self.wanted.items():
            if theirs.get(key, want) != want:
                raise InputError(
                    f"config.json: {key} is {theirs[key]!r}; a {self.name} with that is not supported, only {want!r}"
                )
        check_types(theirs, {key: ours for key, (ours, _) in self.values.items()})
        fields: Config = dict(self.constants)
        for key, (ours, default) in self.values.items():
            value = theirs.get(key)
            if value is None and default is None:
                raise InputError(f"config.json of a {self.name} must say {key!r}, and does not")
            fields[ours] = default if value is None else value
        try:
            fields |= self.read(theirs)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as e:
            raise InputError(f"config.json of this {self.name} is not understood: {type(e).__name__} {e}") from e
        names = list(names)
        for ours, stem in self.heads.items():
            fields[ours] = any(n.startswith(stem) for n in names)
        if self.untied:
            fields["tie_embeddings"] = not any(n.startswith(self.untied) for n in names)
        if fields.get("next_sentence"):
            fields["pooler"] = False
        cfg = TransformerConfig(**fields)
        try:
            problems = cfg.problems()
        except TypeError as e:
            problems = [f"a number is none: {e}"]
        if problems:
            raise InputError("config.json makes a model that cannot be:\n" + "\n".join(f"  - {p}" for p in problems))
        return cfg.resolved()

    def config_json(self, cfg: TransformerConfig) -> Config:
        """Their configuration, from ours. `differences` says whether it means the same."""
        same = {key: getattr(cfg, ours) for key, (ours, _) in self.values.items()}
        theirs = {"architectures": [self.architecture(cfg)], "model_type": self.name, "dtype": "float32"}
        return theirs | self.wanted | same | self.write(cfg)

    def differences(self, cfg: TransformerConfig, unread: tuple[str, ...] = ()) -> list[str]:
        """Why this family cannot hold a configuration of ours; empty if it can.

        Args:
          unread: fields that do not matter.
        """
        stems = [self.prefix, *(stem for ours, stem in self.heads.items() if getattr(cfg, ours))]
        stems += [self.heads["pooler"]] if cfg.next_sentence and "pooler" in self.heads else []
        stems += [self.untied] if self.untied and not cfg.tie_embeddings else []
        try:
            back = self.config(self.config_json(cfg), stems)
        except (InputError, KeyError) as e:
            return [str(e)]
        mine, theirs = dataclasses.asdict(cfg.resolved()), dataclasses.asdict(back)
        return [f"{k}={theirs[k]}, not {mine[k]}" for k in mine if mine[k] != theirs[k] and k not in (*INITIAL, *unread)]

    def absent(self, cfg: TransformerConfig) -> set[str]:
        """Tensors that there are for every layer but the first, where that lacks its first norm."""
        stems = [stem for stem, ours in self.layout.table.items() if ours == "block/attention_norm"]
        return set() if cfg.first_norm else {stems[0].format(0) + suffix for suffix in (".weight", ".bias")}

    def tied(self, theirs: Config) -> bool:
        """Whether the output layer is the token embeddings."""
        found = [(key, default) for key, (ours, default) in self.values.items() if ours == "tie_embeddings"]
        key, default = found[0] if found else ("tie_word_embeddings", True)
        said = theirs.get(key)
        return default if said is None else said

    def _is_body(self, name: str) -> bool:
        """Whether a tensor of this name is one of the table's, other than a head's."""
        stem = re.sub(r"\.\d+\.", ".{}.", name, count=1).rpartition(".")[0]
        return stem in self.layout.table

    def canonical_names(self, tensors: dict[str, Any], tied: bool) -> dict[str, Any]:
        """Tensors under the names of the table: body with its prefix, no buffers, no copies.

        Args:
          tied: the output layer is the token embeddings; a tensor of its own must be a copy of them.

        Raises:
          InputError: what should be a copy is not one.
        """
        found = {}
        for name, tensor in tensors.items():
            if not (self.buffers and name.endswith(self.buffers)):
                for old, new in OLD_NAMES.items():
                    name = name.removesuffix(old) + new if name.endswith(old) else name
                found[name] = tensor
        if not any(name.startswith(self.prefix) for name in found):  # a body saved by itself, its heads beside it
            found = {self.prefix + n if self._is_body(self.prefix + n) else n: t for n, t in found.items()}
        for copy, original in self.copies.items():
            if copy in found and original in found and (tied or copy.endswith((".bias", "embed_tokens.weight"))):
                same = found[copy].shape == found[original].shape
                if not same or not np.array_equal(np.asarray(found[copy]), np.asarray(found[original])):
                    raise InputError(
                        f"{copy} and {original} should be one tensor and differ: is tie_word_embeddings right?"
                    )
                del found[copy]
        return found


def activation_of(theirs: str, allowed: dict[str, str] = ACTIVATIONS) -> str:
    if theirs not in allowed:
        raise InputError(f"config.json: the activation {theirs!r} is not among {', '.join(allowed)}")
    return allowed[theirs]


def published_activation(ours: str, allowed: dict[str, str] = ACTIVATIONS) -> str:
    return next((theirs for theirs, mine in allowed.items() if mine == ours), ours)


def one_dropout(cfg: TransformerConfig) -> float:
    """What config.json has one number for. Raises InputError where the run has two."""
    if cfg.dropout_embed != cfg.dropout_residual:
        raise InputError(
            f"dropout_embed={cfg.dropout_embed} and dropout_residual={cfg.dropout_residual} are one number there"
        )
    return cfg.dropout_embed


def without(table: dict[str, Any], *ends: str) -> dict[str, Any]:
    """A table without the keys that end so."""
    return {stem: ours for stem, ours in table.items() if not stem.endswith(ends)}


def shortest_pattern(kinds: list[str]) -> tuple[str, ...]:
    """The fewest layers that, repeated, give these."""
    n = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return tuple(kinds[:n])
