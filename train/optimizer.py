"""Optimizers and learning-rate schedules, from optax."""

import jax
import jax.numpy as jnp
import optax

from bothways.config import OptimizerConfig
from bothways.model.adapters import NAME
from bothways.model.axes import logical_axes, path_names


def schedule(cfg: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Learning rate as a function of the number of updates made.

    Linear warm-up to `peak` over warmup_steps, then:
      constant: peak;
      cosine, linear: down to final_lr_ratio * peak at decay_steps, and flat from there;
      rsqrt: peak * sqrt(warmup_steps / step) (arXiv 1706.03762, section 5.3);
      wsd: flat, then linear to final_lr_ratio * peak over the last decay_fraction of the steps (arXiv 2404.06395, 4).
    """
    warm, last = cfg.warmup_steps, peak * cfg.final_lr_ratio
    left = max(1, (cfg.decay_steps or steps) - warm)
    match cfg.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, left, cfg.final_lr_ratio)
        case "linear":
            after = optax.linear_schedule(peak, last, left)
        case "rsqrt":
            after = lambda count: peak * jnp.sqrt(warm / (warm + jnp.asarray(count, jnp.float32)))  # noqa: E731
        case "wsd":
            decay = max(1, round(cfg.decay_fraction * steps))
            stable = optax.constant_schedule(peak)
            after = optax.join_schedules(
                [stable, optax.linear_schedule(peak, last, decay)], [max(0, steps - warm - decay)]
            )
    if not warm:
        return after
    # Update number 0 already moves: rates are peak * 1/warm, 2/warm ... peak.
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, max(1, warm - 1)), after], [warm])


def longer(cfg: OptimizerConfig) -> str:
    """What another number of steps means for the learning rate of a run that has begun."""
    if cfg.schedule in ("cosine", "linear") and not cfg.decay_steps:
        return f"the {cfg.schedule} decay now ends there, so the learning rate jumps to where that decay is at this step"
    if cfg.schedule == "wsd":
        return "the rate is held until the last decay_fraction of them; where it had begun to decay it rises again"
    return "the learning rate of each step stays what it was"


def decayed(params: optax.Params) -> optax.Params:
    """True for parameters that weight decay applies to: kernels, embeddings and adapters, not biases and norms."""

    def is_matrix(path: tuple, _: jax.Array) -> bool:
        return path_names(path)[-1] in ("kernel", "embedding") or NAME in path_names(path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def matrices(params: optax.Params) -> optax.Params:
    """Muon's view of every parameter: which axes a block's kernel reads from and writes to; None for the rest."""

    def view(path: tuple, _: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = path_names(path)
        if "blocks" not in names or names[-1] != "kernel":
            return None
        axes = logical_axes(names)
        inner = tuple(i for i, axis in enumerate(axes) if axis not in ("layers", "embed"))
        embed = (axes.index("embed"),)
        return optax.contrib.MuonDimensionNumbers(*((inner, embed) if axes[-1] == "embed" else (embed, inner)))

    return jax.tree_util.tree_map_with_path(view, params)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """The whole gradient scaled down to a norm of `limit` where it is larger.

    As optax's, but one factor for all: dividing and choosing, element by element, would write the gradient once more.
    """

    def update(grads: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None):
        factor = jnp.minimum(1.0, limit / optax.global_norm(grads))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decaying_only_matrices(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """For an optimizer that needs parameters for nothing but their decay, and has no mask for some of them: what does not
    decay is shown to it as zeros."""

    def update(grads: optax.Updates, state: optax.OptState, params: optax.Params):
        shown = jax.tree.map(lambda p, decays: p if decays else jnp.zeros_like(p), params, decayed(params))
        return optimizer.update(grads, state, shown)

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer, with decoupled weight decay scaled by the learning rate."""
    rate = schedule(cfg, steps, cfg.learning_rate)
    match cfg.name:
        case "adamw":
            update = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
        case "lion":
            update = optax.lion(rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
        case "adafactor":
            # Relative step sizes are off: the schedule sets the rate. Updates are clipped to an RMS of 1 (arXiv 1804.04235,
            # section 6). Factored from 32 on, since attention kernels are [L, D, H, K] with narrow heads.
            update = optax.chain(
                optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            muon = optax.contrib.muon(
                rate,
                beta=cfg.momentum,
                eps=cfg.eps,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=decayed,  # a part of the state of runs that are resumed
                adam_b1=cfg.b1,
                adam_b2=cfg.b2,
                adam_weight_decay=cfg.weight_decay,
                adam_learning_rate=schedule(cfg, steps, cfg.adam_learning_rate or cfg.learning_rate),
                muon_weight_dimension_numbers=matrices,
            )
            update = decaying_only_matrices(muon)
    return optax.chain(clip_by_global_norm(cfg.clip_norm), update) if cfg.clip_norm else update
