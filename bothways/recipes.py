"""Recipe: everything that makes a run, as one frozen value, checked whole before anything is allocated."""

import dataclasses
import json
import math
import os
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from bothways.config import OBJECTIVES_BY_FAMILY, MeshConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.data.mixture_config import weights_alone
from bothways.errors import InputError
from bothways.formats import FORMAT, upgrade_recipe
from bothways.model.config import TransformerConfig

if TYPE_CHECKING:
    from bothways.train.loop import Result

# Fields that may differ between a run and its continuation: where, how often and how long, not what.
HOW_OFTEN = (
    "steps",
    "grad_accum_steps",
    "log_every",
    "max_to_keep",
    "average_last_checkpoints",
    "eval_every",
    "eval_rows",
    "save_every",
    "save_every_minutes",
    "tracker",
)
# What the text is, its fingerprint says, wherever it lies.
WHERE = ("data.cache", "data.cache_gb", "data.corpus", "data.validation")
RESUMABLE_FIELDS = (
    "mesh",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    *WHERE,
    *(f"train.{name}" for name in HOW_OFTEN),
)

IN_JSON = {
    str: (str, "a string"),
    Literal: (str, "a string"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    tuple: (list, "a list"),
}
"""How a field of each type is written: types of JSON's values, and their name."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    name: str = ""
    family: Literal["gpt", "bert", "seq2seq"] = "gpt"
    model: TransformerConfig = TransformerConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

    def fit(self, workdir: str | os.PathLike) -> "Result":
        """Train into a run directory, on a disk or a bucket, or resume the run that is there.

        Raises:
          InputError: the recipe cannot run, or the directory holds another run.
          Stopped: SIGTERM came, and the state is saved.
          Diverged: too many steps in a row had no finite loss.
        """
        from bothways.train.loop import train

        return train(self, workdir)

    def check(self, devices: int) -> None:
        """Raises InputError that lists everything wrong with the recipe on so many devices, with the numbers."""
        found = _invalid_choices(self)
        found += [*self.model.problems(), *self.data.problems(), *self.objective.problems()]
        found += [*self.optimizer.problems(), *self.train.problems(), *self.mesh.problems(devices)]
        if not found:
            sizes = self.mesh.sizes(devices)
            shards = sizes["data"] * sizes["fsdp"]
            for _, _, batch in self.train.stages():
                if batch % (shards * self.train.grad_accum_steps):
                    found.append(
                        f"a batch of {batch} rows does not divide into data*fsdp={shards} parts"
                        f" times train.grad_accum_steps={self.train.grad_accum_steps}: set "
                        f"--train.{'batch-size' if batch == self.train.batch_size else 'batch-size-start'} to a multiple of "
                        f"{shards * self.train.grad_accum_steps}, or change the mesh"
                    )
            kind, wanted = self.objective.kind, OBJECTIVES_BY_FAMILY[self.family]
            framed = kind in ("masked", "hybrid", "spans")  # a token, and what stands around it
            least = 5 if self.objective.next_sentence else 3 if framed else 2
            for name, length in (
                ("model.context_length", self.model.context_length),
                ("train.short_length", self.train.short_length),
            ):
                if length % sizes["context"]:
                    found.append(f"{name}={length} is not divisible by mesh.context={sizes['context']}")
                if 0 < length < least:
                    what = "next sentences" if self.objective.next_sentence else f"objective.kind={kind}"
                    found.append(f"{name} is {length}; rows for {what} need at least {least} tokens")
            if kind not in wanted:
                found.append(
                    f"objective.kind={kind} is not for a {self.family}, whose mask serves {' or '.join(wanted)}; "
                    f"set --objective.kind {wanted[0]}"
                )
            if kind == "diffusion":
                found += self._dial_problems()
            if (kind == "pairs") != bool(self.data.source_field):
                found.append(
                    f"objective.kind={kind} and data.source_field={self.data.source_field!r} disagree: pairs, and only "
                    "pairs, need data.source_field and data.target_field"
                )
            if self.model.lora.rank and not self.train.init_from:
                found.append(
                    f"model.lora.rank={self.model.lora.rank}: adapters are for a run that is trained already; name it with "
                    "--train.init-from RUN"
                )
            if kind == "chat" and not self.data.messages_field:
                found.append("objective.kind=chat trains on conversations: set --data.messages-field messages")
            if kind == "contrastive" or self.data.text_fields:
                found += self._contrast_problems()
            if self.data.messages_field and kind not in ("chat", "diffusion"):
                found.append(
                    f"data.messages_field={self.data.messages_field!r}: conversations are for objective.kind=chat or "
                    f"diffusion, not {kind}"
                )
            if self.model.predicts and self.family != "gpt":
                found.append(
                    f"model.predicts={self.model.predicts} is for a gpt; a {self.family} predicts as it does: leave it out"
                )
            if self.model.predicts == "own" and kind != "diffusion":
                found.append(
                    f"objective.kind={kind} predicts next tokens, and model.predicts=own; leave model.predicts out"
                )
            if self.train.average_last_checkpoints > self.train.max_to_keep:
                found.append(
                    f"train.average_last_checkpoints={self.train.average_last_checkpoints} cannot be averaged of "
                    f"train.max_to_keep={self.train.max_to_keep}; keep more"
                )
            if self.family == "bert" and not self.model.masked_head and kind != "contrastive":
                found.append(f"objective.kind={kind} needs the head that predicts tokens: set --model.masked-head")
            if self.family != "bert" and self.model.embed_width:
                found.append(f"model.embed_width is for encoders, and this is a {self.family}: leave it out")
            if self.family == "bert" and self.model.output_transform:
                found.append("a bert's masked-token head is model.masked_transform: leave model.output_transform out")
            if self.family == "bert" and self.model.output_bias:
                found.append("a bert's masked-token head has a bias already: leave model.output_bias out")
            if self.objective.next_sentence and kind != "masked":
                found.append(f"objective.next_sentence is for masked objectives, not {kind}; leave it out")
            if self.objective.next_sentence and not self.model.next_sentence:
                found.append("objective.next_sentence needs the head: set --model.next-sentence")
            if self.objective.next_sentence and self.model.segment_types not in (0, 2):
                found.append(f"pairs have 2 segment types, and model.segment_types={self.model.segment_types}")
            if self.objective.label_smoothing and self.model.pad_vocab_to_multiple_of > 1:
                found.append(
                    f"objective.label_smoothing={self.objective.label_smoothing} spreads over all rows of the token "
                    f"table; with model.pad_vocab_to_multiple_of={self.model.pad_vocab_to_multiple_of} some stand for no "
                    "token: set one to 0 or 1"
                )
            if self.train.short_length > self.model.context_length:
                found.append(
                    f"train.short_length={self.train.short_length} > model.context_length={self.model.context_length}"
                )
            if 0 < self.optimizer.decay_steps <= self.optimizer.warmup_steps:
                found.append(
                    f"optimizer.decay_steps={self.optimizer.decay_steps} is not after "
                    f"optimizer.warmup_steps={self.optimizer.warmup_steps}: the rate would fall to its floor at once"
                )
            if self.train.steps <= self.optimizer.warmup_steps:
                found.append(
                    f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of "
                    f"train.steps={self.train.steps}; warm up for fewer steps"
                )
        if found:
            raise InputError(f"recipe {self.name or '(unnamed)'} cannot run:\n" + "\n".join(f"  - {p}" for p in found))

    def _contrast_problems(self) -> list[str]:
        """What is wrong with contrastive training."""
        ask, fields, context = self.objective, self.data.text_fields, self.model.context_length
        if ask.kind != "contrastive":
            return [
                f"data.text_fields={' '.join(fields)}: sets of texts are for objective.kind=contrastive, not {ask.kind}"
            ]
        found = []
        if not fields:
            found.append("objective.kind=contrastive trains on sets of texts: set --data.text-fields QUERY POSITIVE")
        if ask.loss == "triplet" and len(fields) < 3:
            found.append("objective.loss=triplet needs hard negatives: name a third of --data.text-fields")
        if (ask.loss == "cosent") != bool(self.data.score_field):
            found.append(
                f"objective.loss={ask.loss} and data.score_field={self.data.score_field!r} disagree: cosent, and only "
                "cosent, needs scores"
            )
        if ask.loss == "cosent" and len(fields) > 2:
            found.append(f"objective.loss=cosent scores two texts, and data.text_fields has {len(fields)}")
        if self.family == "gpt" and ask.pool == "cls":
            found.append("objective.pool=cls: the first token of a gpt sees no other; set --objective.pool last, or mean")
        if ask.text_length and not 3 <= ask.text_length <= context:
            found.append(
                f"objective.text_length is {ask.text_length}; it must be from 3 to model.context_length={context}"
            )
        if wide := [width for width in ask.widths if width > self.model.d_model]:
            found.append(f"objective.widths has {wide[0]}, and model.d_model is {self.model.d_model}")
        return found

    def _dial_problems(self) -> list[str]:
        """What is wrong with block sizes."""
        sizes, context = self.objective.block_sizes, self.model.context_length
        found = [
            f"objective.block_sizes has {size}, more than the {context} tokens of a row; say 0 for the whole row"
            for size in sizes
            if size > context
        ]
        if self.family == "bert" and set(sizes) != {0}:
            found.append(
                f"objective.block_sizes is {sizes}: a bert reads whole rows; set it to 0, or take --family gpt with "
                "--model.predicts own"
            )
        if self.train.short_length and set(sizes) != {0}:
            found.append(
                f"train.short_length={self.train.short_length} is not for objective.block_sizes={sizes}; leave it out"
            )
        return found

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Raises InputError for text that is no JSON, and for fields or types that are not those of a recipe."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"a recipe that is not JSON: {e}") from e
        return cls.from_values(values, "recipe")

    @classmethod
    def from_values(cls, values: Any, where: str) -> "Recipe":
        """As `from_json`, of what the JSON holds; `where` is what an error calls it."""
        return _build(cls, upgrade_recipe(values) if isinstance(values, dict) else values, where)

    def differences(self, other: "Recipe") -> list[str]:
        """Fields in which two recipes make different runs, as `field: mine -> other's`."""
        mine, theirs = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        for flat in (mine, theirs):
            flat["train.init_from"] = flat["train.init_from"].rstrip("/")
            flat["data.mixture"] = weights_alone(flat["data.mixture"])  # what the texts are, their fingerprint says
        return [
            f"{k}: {mine[k]} -> {theirs[k]}"
            for k in mine
            if mine[k] != theirs[k] and k != "name" and not any(k == f or k.startswith(f + ".") for f in RESUMABLE_FIELDS)
        ]


def _invalid_choices(section: Any, where: str = "") -> list[str]:
    """What stands in a field, or in a tuple there, that its type does not list; and numbers that are not finite."""
    found = []
    for name, hint in get_type_hints(type(section)).items():
        value, several = getattr(section, name), get_origin(hint) is tuple
        choices = get_args(get_args(hint)[0] if several else hint)
        if dataclasses.is_dataclass(hint):
            found += _invalid_choices(value, f"{where}{name}.")
        elif choices and not set(value if several else [value]) <= set(choices):
            found.append(f"{where}{name} is {value!r}; there are {', '.join(choices)}")
        elif any(isinstance(v, float) and not math.isfinite(v) for v in (value if several else [value])):
            found.append(f"{where}{name} is {value}; it must be a finite number")
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _build(cls: type, values: Any, where: str) -> Any:
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise InputError(
            f"{where} is {json.dumps(values)[:60]}; it must be a JSON object, with the fields of {cls.__name__}"
        )
    unknown = set(values) - set(hints)
    if unknown:
        raise InputError(f"{where} has fields this version does not know: {', '.join(sorted(unknown))}")

    def convert(name: str, value: Any) -> Any:
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            return _build(hint, value, f"{where}.{name}")
        types, expected = IN_JSON[get_origin(hint) or hint]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise InputError(f"{where}.{name} is {json.dumps(value)[:60]}; it must be {expected}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{where}.{name} is {value!r}; there are {', '.join(map(repr, get_args(hint)))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}.{name} is {value}; it must be a finite number")
        if types is list:
            element, wanted = IN_JSON[get_origin(get_args(hint)[0]) or get_args(hint)[0]]
            if not all(isinstance(v, element) and (element is bool or not isinstance(v, bool)) for v in value):
                raise InputError(f"{where}.{name} is {json.dumps(value)[:60]}; each element must be {wanted}")
        return tuple(value) if types is list else value

    return cls(**{name: convert(name, value) for name, value in values.items()})
