"""The published families by name, and which of them holds a model of ours."""

from collections.abc import Callable

from bothways.config import ObjectiveConfig
from bothways.convert import albert_mpnet, dial, encoder_decoders, layer_norm_llamas, llamas, parallel, rotary_encoders
from bothways.convert.decoders import GPT2, LLAMA, MISTRAL, OPENAI_GPT, PHI3, QWEN3
from bothways.convert.encoders import BERT, CAMEMBERT, DISTILBERT, ELECTRA, ROBERTA, XLM_ROBERTA
from bothways.convert.family import Config, Family
from bothways.convert.modernbert import MODERNBERT, MODERNBERT_DECODER
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

ENCODERS = (ROBERTA, XLM_ROBERTA, CAMEMBERT, BERT, DISTILBERT, ELECTRA, MODERNBERT)
ENCODERS += (*albert_mpnet.FAMILIES, *rotary_encoders.FAMILIES)
DECODERS = (GPT2, OPENAI_GPT, LLAMA, MISTRAL, QWEN3, PHI3, *llamas.FAMILIES, *parallel.FAMILIES, *dial.FAMILIES)
DECODERS += (*layer_norm_llamas.FAMILIES, MODERNBERT_DECODER)
FAMILIES = {family.name: family for family in (*DECODERS, *ENCODERS, *encoder_decoders.FAMILIES)}


def family_of(theirs: Config) -> Family:
    """Raises InputError for a model_type that is not here."""
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"config.json is of the family {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_for(
    cfg: TransformerConfig,
    ours: str,
    pad: int,
    preferred: str = "",
    differences: Callable[[Family], list[str]] | None = None,
    objective: ObjectiveConfig | None = None,
) -> Family:
    """The published family that computes the function of a configuration of ours, padded with this id; of several the
    preferred one, else the first.

    Args:
      objective: the run's; None: one that asks for no family of its own.
      differences: of a family from a run with a task head; None: from the configuration alone.

    Raises:
      InputError: none does; says for each in what it differs.
    """
    reasons = []
    for family in sorted(FAMILIES.values(), key=lambda family: family.name != preferred):
        if family.ours == ours and (not family.objective if objective is None else family.trained_by(objective)):
            different = family.differences(cfg) if differences is None else differences(family)
            different += [f"padding={family.pad}, not {pad}"] if family.pad not in (None, pad) else []
            if not different:
                return family
            reasons.append(f"  - {family.name} has " + ", ".join(different))
    if not reasons:
        raise InputError(f"no published family is a {ours} that was trained by {objective.kind} as this run was")
    raise InputError("no published family computes what this run does:\n" + "\n".join(reasons))
