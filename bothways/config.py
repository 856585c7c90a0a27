"""How a model is trained: objective, optimizer, schedule, batches, mesh."""

import dataclasses
import math
from typing import Literal

from bothways.errors import InputError
from bothways.model.config import LoRAConfig

OBJECTIVES_BY_FAMILY: dict[str, tuple[str, ...]] = {
    "gpt": ("causal", "chat", "hybrid", "diffusion", "contrastive"),
    "bert": ("masked", "diffusion", "contrastive"),
    "seq2seq": ("pairs", "spans"),
}
"""Objectives per family."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    kind: Literal["causal", "chat", "masked", "hybrid", "diffusion", "contrastive", "pairs", "spans"] = "causal"
    """causal: predict the next token. chat: predict the answers in conversations (data.messages_field). masked: predict
    masked tokens from both sides. hybrid: causal and masked, by one decoder.
    diffusion: predict a randomly masked share of every block of tokens, given all blocks before it (arXiv 2503.09573).
    contrastive: tell the text that matches another from those that do not, by their vectors (data.text_fields).
    For encoder-decoders, pairs: predict a target from its source; spans: restore masked spans of plain text."""
    causal_share: float = 0.5
    """Share of the rows of a hybrid objective that are causal; the others are bidirectional."""
    mask_rate: float = 0.15
    """Share of the tokens that `masked` and `spans` choose to be predicted."""
    block_sizes: tuple[int, ...] = (0,)
    """Block sizes of `diffusion` in tokens, one drawn for every row; 0: the whole row. 1 is a GPT's next-token
    prediction, 0 the masked diffusion of LLaDA (arXiv 2502.09992)."""
    weighting: Literal["elbo", "flat"] = "elbo"
    """For `diffusion`. elbo: a token masked with probability t weighs 1/t, so that the loss is a bound on the negative
    log-likelihood (arXiv 2406.07524, equation 11); flat: all masked tokens weigh the same (arXiv 2602.15014)."""
    span_length: float = 3.0
    """Mean length of a masked span, in tokens."""
    mask_token_prob: float = 0.8
    """Share of the chosen tokens that become [MASK]."""
    random_token_prob: float = 0.1
    """Share of the chosen tokens that become another token; the rest stay unchanged."""
    whole_words: bool = False
    """Choose whole words rather than tokens."""
    next_sentence: bool = False
    """Rows are pairs of texts, and next-sentence prediction is part of the loss."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary."""

    loss: Literal["ranking", "triplet", "cosent"] = "ranking"
    """For `contrastive`. ranking: the match among all texts of the batch (arXiv 1705.00652, section 4.4); triplet: the
    match nearer than its hard negatives by a margin (arXiv 1503.03832); cosent: pairs in the order of their scores."""
    pool: Literal["mean", "cls", "last"] = "mean"
    """A text's vector: the mean over its tokens, or the features of the first (cls) or of the last."""
    text_length: int = 0
    """Most tokens of a text, including those that open and close it; the rest is cut. 0: model.context_length."""
    temperature: float = 0.05
    """Cosines are divided by this (ranking, cosent)."""
    margin: float = 0.2
    """For `triplet`: the margin between cosines."""
    widths: tuple[int, ...] = ()
    """Matryoshka (arXiv 2205.13147): the loss is summed over prefixes of each vector with these widths. Empty: only the
    whole vector."""

    def problems(self) -> list[str]:
        found = []
        if self.temperature <= 0:
            found.append(f"objective.temperature is {self.temperature}; it must be positive")
        if self.margin < 0:
            found.append(f"objective.margin is {self.margin}; it cannot be negative")
        if self.widths and (min(self.widths) < 1 or len(set(self.widths)) < len(self.widths)):
            found.append(f"objective.widths is {self.widths}; give different numbers, each at least 1")
        if not 0 <= self.label_smoothing < 1:
            found.append(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.span_length < 1:
            found.append(f"objective.span_length is {self.span_length}; a span has at least 1 token")
        if not 0 <= self.causal_share <= 1:
            found.append(f"objective.causal_share is {self.causal_share}; it must be a share, from 0 to 1")
        if not self.block_sizes or min(self.block_sizes) < 0:
            found.append(
                f"objective.block_sizes is {self.block_sizes}; give at least one number of tokens, 0 for the whole row"
            )
        if not 0 < self.mask_rate < 1:
            found.append(f"objective.mask_rate is {self.mask_rate}; it must be between 0 and 1")
        if (
            min(self.mask_token_prob, self.random_token_prob) < 0
            or self.mask_token_prob + self.random_token_prob > 1 + 1e-9
        ):
            found.append(
                f"objective.mask_token_prob={self.mask_token_prob} and objective.random_token_prob={self.random_token_prob} "
                "must be shares of one whole"
            )
        return found


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside blocks, AdamW for the rest."""
    learning_rate: float = 6e-4
    """The highest rate, reached after warm-up."""
    adam_learning_rate: float = 0.0
    """With muon, the highest rate of the parameters that AdamW trains. 0: learning_rate."""
    schedule: Literal["constant", "cosine", "linear", "rsqrt", "wsd"] = "cosine"
    """After warm-up. rsqrt: arXiv 1706.03762, section 5.3. wsd: stable, then linear over the last decay_fraction."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """Step at which cosine and linear reach final_lr_ratio. 0: the last step."""
    decay_fraction: float = 0.2
    final_lr_ratio: float = 0.0
    """The last learning rate, as a share of the highest."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.1
    """Decoupled, on kernels and embeddings; never on biases and norms."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient. 0: not clipped."""

    def problems(self) -> list[str]:
        found = []
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be positive")
        for name in ("adam_learning_rate", "weight_decay", "clip_norm", "warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("decay_fraction", "final_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.schedule == "rsqrt" and self.warmup_steps == 0:
            found.append("optimizer.schedule=rsqrt falls from the end of warm-up; set optimizer.warmup_steps")
        return found


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 8
    """Rows in a global batch."""
    batch_size_start: int = 0
    """Rows in the first batches; doubles along a line that reaches batch_size after batch_size_ramp_rows. 0: no ramp."""
    batch_size_ramp_rows: int = 0
    """Rows consumed by the end of the batch-size ramp."""
    short_length: int = 0
    """Sequence length in the first short_steps steps, in tokens; after them it is model.context_length. 0: none."""
    short_steps: int = 0
    grad_accum_steps: int = 1
    """Micro-batches that a batch is split into, one after the other, to save memory; the result is the same."""
    seed: int = 0
    init_from: str = ""
    """A run directory, trained here or imported, whose weights this run starts from. Empty: random ones."""
    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    log_every: int = 10
    eval_every: int = 500
    eval_rows: int = 0
    """Held-out rows per evaluation, spread evenly. 0: all."""
    save_every: int = 500
    """Where it divides eval_every, every evaluation has a checkpoint, and the best of them can be kept."""
    save_every_minutes: int = 0
    """Also save when this many minutes have passed since the last checkpoint. 0: by steps only."""
    patience: int = 0
    """Stop after this many evaluations in a row that were no better than the best. 0: never."""
    max_to_keep: int = 2
    """Number of newest checkpoints to keep; the best on held-out text is kept as well."""
    average_last_checkpoints: int = 1
    """Number of newest checkpoints to average when the run is read (arXiv 1706.03762, section 6.1)."""
    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl: event files in the run directory, or a service whose package is installed."""

    def problems(self) -> list[str]:
        found = []
        for name in (
            "steps",
            "batch_size",
            "grad_accum_steps",
            "log_every",
            "eval_every",
            "save_every",
            "max_to_keep",
            "average_last_checkpoints",
            "max_nonfinite_steps",
        ):
            if getattr(self, name) < 1:
                found.append(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "seed",
            "patience",
            "eval_rows",
            "save_every_minutes",
            "batch_size_start",
            "batch_size_ramp_rows",
            "short_length",
            "short_steps",
        ):
            if getattr(self, name) < 0:
                found.append(f"train.{name} is {getattr(self, name)}; it cannot be negative")
        if self.patience > 0 and self.save_every > 0 and self.eval_every % self.save_every:
            found.append(
                f"train.patience counts from the best checkpoint, and with train.save_every={self.save_every} some evaluations "
                f"(train.eval_every={self.eval_every}) have none: set a save_every that divides eval_every"
            )
        if self.seed > 2**31 - 1:
            found.append(f"train.seed is {self.seed}; it must be at most {2**31 - 1}")
        if (self.batch_size_start > 0) != (self.batch_size_ramp_rows > 0):
            found.append(
                f"train.batch_size_start={self.batch_size_start} and train.batch_size_ramp_rows="
                f"{self.batch_size_ramp_rows}: set both or neither"
            )
        if (self.short_length > 0) != (self.short_steps > 0):
            found.append(
                f"train.short_length={self.short_length} and train.short_steps={self.short_steps}: set both or neither"
            )
        if self.batch_size_start >= self.batch_size:
            found.append(
                f"train.batch_size_start={self.batch_size_start} must be less than train.batch_size={self.batch_size}"
            )
        return found

    def stages(self) -> list[tuple[int, int, int]]:
        """The batch-size ramp as (first step, first row, batch size), one entry for each size.

        Sizes double from batch_size_start; each lasts as long as a straight line from batch_size_start to batch_size over
        batch_size_ramp_rows rows stays below the next (arXiv 2005.14165, appendix B). Without a ramp there is one stage.
        """
        if not self.batch_size_start:
            return [(0, 0, self.batch_size)]
        stages, step, row, size = [], 0, 0, self.batch_size_start
        while size < self.batch_size:
            stages.append((step, row, size))
            following = min(2 * size, self.batch_size)
            until = (
                self.batch_size_ramp_rows
                * (following - self.batch_size_start)
                / (self.batch_size - self.batch_size_start)
            )
            lasts = max(1, round((until - row) / size))
            step, row, size = step + lasts, row + lasts * size, following
        return [*stages, (step, row, size)]

    def batch_at(self, step: int) -> tuple[int, int]:
        """(rows consumed before this step, batch size at it): the data position is a function of the step."""
        first, row, size = next(s for s in reversed(self.stages()) if s[0] <= step)
        return row + (step - first) * size, size

    def steps_for(self, rows: int) -> int:
        """Steps after which at least so many rows are consumed."""
        first, row, size = next(s for s in reversed(self.stages()) if s[1] <= rows)
        return first + -(-(rows - row) // size)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; the product is the number of devices. -1, for one axis: all devices that are left.

    If the devices are several slices with a slow network between them, the `data` axis crosses that network.
    """

    data: int = -1
    """Batch rows are sharded; parameters are replicated."""
    fsdp: int = 1
    """Batch rows are sharded, and so are parameters and optimizer state (arXiv 2004.13336, 1910.02054)."""
    tensor: int = 1
    """Heads, MLP and vocabulary are sharded (arXiv 1909.08053)."""
    context: int = 1
    """Sequence (context) parallelism: positions of a row are sharded; attention gathers keys and values (arXiv 2407.21783, 3.3.2)."""
    max_replicated_fraction: float = 0.1
    """Largest share of all parameter bytes that a device may hold in addition to its own 1 / (fsdp * tensor) of them."""
    vmem_kib: int = 0
    """KiB of a TPU's VMEM that XLA may use for one operation of the train step; `plan --search` tries other values with
    the best layout. 0: chosen by chip and width (bothways/compiler.py)."""

    def axes(self) -> dict[str, int]:
        """Axis sizes as given, in the order of the mesh."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "context")}

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis sizes on so many devices; the sizes multiply to `devices`, or `problems` says why not."""
        sizes = self.axes()
        known = 1
        for size in sizes.values():
            known *= size if size > 0 else 1
        return {name: size if size > 0 else max(1, devices // known) for name, size in sizes.items()}

    def problems(self, devices: int) -> list[str]:
        given = self.axes()
        if self.vmem_kib < 0:
            return [f"mesh.vmem_kib is {self.vmem_kib}; it cannot be negative"]
        if not 0 <= self.max_replicated_fraction <= 1:
            return [f"mesh.max_replicated_fraction is {self.max_replicated_fraction}; it must be in [0, 1]"]
        if any(size == 0 or size < -1 for size in given.values()) or list(given.values()).count(-1) > 1:
            return [f"mesh {given}: every axis must be at least 1, and -1 may stand once for the rest"]
        product = 1
        for size in self.sizes(devices).values():
            product *= size
        return [] if product == devices else [f"mesh {given} does not multiply to the {devices} devices that are here"]


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune` besides those of the run itself."""

    epochs: int = 0
    """Passes over the training split. 0: 3, or 5 for small bodies, of less than 20M parameters."""
    batch_size: int = 32
    """Items in a batch."""
    learning_rates: tuple[float, ...] = ()
    """The grid. Empty: 2e-5, 3e-5, 5e-5 as in BERT; for small bodies 3e-3; for adapters ten times these, at most 1e-2."""
    optimizer: Literal["", "adamw", "adafactor", "lion", "muon"] = ""
    """Empty: what the run was trained with."""
    seeds: int = 3
    """Runs per learning rate."""
    length: int = 0
    """Most tokens of a text; shorter texts are padded only to the length of their batch. 0: the model's context."""
    pool: Literal["", "token", "mean"] = ""
    """What a head for whole texts reads. token: the first (masked) or the last (causal), as in the papers; mean: the mean
    of all tokens. Empty: token, or mean for small bodies, whose single tokens have learned little."""
    warmup_share: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.01
    class_weights: tuple[str, ...] = ()
    """Weights of labels in the loss: `balanced`, the same total for all labels; or LABEL=WEIGHT, and 1 for the others. In
    multi-label tasks: the weight of a label that a text has, compared with those that it does not have."""
    dropout: float = 0.1
    """Dropout of the new head."""
    lm_weight: float = 0.0
    """Weight of the language-model loss that is added, for causal bodies (GPT-1, section 3.2, has 0.5)."""
    patience: int = 2
    """Stop after this many epochs without a better validation metric."""
    scratch: bool = True
    """Also train the same network from random weights, over the same grid; not with adapters."""
    save_every_minutes: int = 10
    """Minutes between checkpoints, besides the one after every epoch. 0: after epochs only."""
    lora: LoRAConfig = LoRAConfig()
    """With lora.rank above 0 the body is frozen, and adapters and the head are trained."""
    mesh: MeshConfig = MeshConfig()

    def settled(self, parameters: int, optimizer: str) -> "FinetuneConfig":
        """With what was left open, for a body of so many parameters that was trained with this optimizer. Adapters want
        ten times the rates (arXiv 2106.09685, appendix D), and on random weights they say nothing."""
        epochs, rates, pool = (5, (3e-3,), "mean") if parameters < 20_000_000 else (3, (2e-5, 3e-5, 5e-5), "token")
        if self.lora.rank:
            rates = tuple(min(round(10 * rate, 10), 1e-2) for rate in rates)
        return dataclasses.replace(
            self,
            epochs=self.epochs or epochs,
            learning_rates=self.learning_rates or rates,
            optimizer=self.optimizer or optimizer,
            pool=self.pool or pool,
            scratch=self.scratch and not self.lora.rank,
        )

    def check(self, kind: str, context: int, gated: bool) -> None:
        """Raises InputError for numbers out of range.

        Args:
          kind: the objective that the body was trained with.
          context: most tokens that it reads.
          gated: whether its MLPs have a gate.
        """
        if problems := self.lora.problems(gated):
            raise InputError("; ".join(problem.removeprefix("model.") for problem in problems))
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name.replace('_', '-')} is {value}; it must be a finite number")
        for name in ("batch_size", "seeds", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("epochs", "save_every_minutes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; it cannot be negative")
        for name in ("lm_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; it cannot be negative")
        for name in ("warmup_share", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be in [0, 1)")
        if self.lm_weight and kind != "causal":
            raise InputError("--lm-weight is for causal runs; one that reads both ways sees the next token")
        if self.length and not 5 <= self.length <= context:  # two texts of a token each, and what stands around them
            raise InputError(f"length is {self.length}; it must be between 5 and the model's context, {context}, or 0")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise InputError(f"learning-rates is {self.learning_rates}; each must be positive and finite")
        names = [f"{rate:g}" for rate in self.learning_rates]  # those of the candidates' directories
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(
                f"learning-rates has {', '.join(twice)} more than once, to the six digits that tell rates apart; give each once"
            )
