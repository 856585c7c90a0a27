"""The train step: one jitted function of (state, batch), the same for every family and every mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from bothways import sharding
from bothways.compiler import compiler_options
from bothways.model.adapters import frozen_types, join, split
from bothways.model.axes import activation_shardings
from bothways.platform import multiplies_bfloat16
from bothways.train.gradient_cache import cached_gradients, cut
from bothways.train.objectives import Batch, Objective, Sums

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a step changes. Random keys are made from the seed and the step, so there is none to keep."""

    step: Int[jax.Array, ""]
    params: Any
    opt_state: optax.OptState
    consecutive_nonfinite: Int[jax.Array, ""]
    bad_total: Int[jax.Array, ""]
    frozen: Any = None
    """Parameters that are used and never trained, those of the base that adapters are for; they are not in checkpoints."""

    @property
    def weights(self) -> Any:
        """All parameters of the module."""
        return join(self.params, self.frozen)


def init_state(module: nn.Module, inputs: Batch, optimizer: optax.GradientTransformation, seed: Any) -> TrainState:
    """A fresh state. Run it under jit with out_shardings, so that it is born where it belongs."""
    params, frozen = module.init(jax.random.key(seed), **inputs)["params"], None
    if module.cfg.lora.rank:
        params, frozen = split(params)
        frozen = jax.tree.map(lambda x, s: x.astype(s.dtype), frozen, frozen_types(frozen, module.cfg))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero, frozen)


def state_shardings(mesh: Mesh, shapes: TrainState, max_replicated_fraction: float = 1.0) -> TrainState:
    """A sharding for every leaf of the state. Raises InputError as parameter_shardings does."""
    copied = NamedSharding(mesh, PartitionSpec())
    params, frozen = sharding.parameter_shardings(mesh, shapes.weights, max_replicated_fraction), None
    if shapes.frozen is not None:
        params, frozen = split(params)
    spread = sharding.spread_over_data(params, shapes.params)
    opt_state = sharding.optimizer_shardings(mesh, shapes.opt_state, shapes.params, spread)
    return TrainState(copied, params, opt_state, copied, copied, frozen)


def in_training_dtype(module: nn.Module, mesh: Mesh) -> nn.Module:
    """The module as steps are taken with it: bfloat16 if the configuration leaves it open and one CPU multiplies that faster.
    What is evaluated or sampled on a CPU stays float32."""
    open_on_cpu = module.cfg.dtype == "auto" and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if not (open_on_cpu and multiplies_bfloat16()):
        return module
    return module.clone(cfg=dataclasses.replace(module.cfg, dtype="bfloat16"))


def make_train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    *,
    accumulate: int = 1,
    vmem_kib: int = 0,
) -> Callable[[TrainState, Batch, int], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch, the run's seed) -> (state, metrics). Its state argument is consumed.

    With accumulate=A the batch goes through in A pieces; weights are summed over the whole batch first, so
    loss and gradient are those of the whole batch. Where loss or gradient is not finite nothing is updated but
    the counters.
    """

    module = in_training_dtype(module, mesh)

    def measured(sums: Sums, totals: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        shares = {name: term.nats / totals[name] for name, term in sums.items()}
        accuracy = {f"{name}_accuracy": term.correct / totals[name] for name, term in sums.items()}
        return sum(shares.values()), shares | accuracy

    def gradients(
        params: Any, batch: Batch, totals: dict[str, jax.Array], key: jax.Array, frozen: Any
    ) -> tuple[Any, Metrics]:
        def loss_of(params: Any) -> tuple[jax.Array, Metrics]:
            def run(bound: nn.Module) -> Any:
                return objective.terms(bound, batch, False)

            sums = module.apply({"params": join(params, frozen)}, rngs={"dropout": key}, method=run)
            return measured(sums, totals)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, metrics

    def step(state: TrainState, batch: Batch, seed: jax.Array) -> tuple[TrainState, Metrics]:
        with activation_shardings(sharding.activation_sharding_fn(mesh)):
            totals = {name: jnp.maximum(w, 1e-9) for name, w in objective.weights(batch).items()}
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            if accumulate == 1:
                grads, metrics = gradients(state.params, batch, totals, key, state.frozen)
            elif objective.halves:
                halves = objective.halves

                def encode(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
                    weights = {"params": join(params, state.frozen)}
                    return module.apply(weights, rngs={"dropout": key}, method=lambda m: halves.encode(m, batch, False))

                keys = jax.random.split(key, accumulate)
                measure = functools.partial(measured, totals=totals)
                grads, metrics = cached_gradients(encode, halves.compare, measure, state.params, batch, keys)
            else:
                pieces, keys = cut(batch, accumulate), jax.random.split(key, accumulate)

                def add(carry: Any, inputs: Any) -> tuple[Any, None]:
                    more = gradients(state.params, inputs[0], totals, inputs[1], state.frozen)
                    return jax.tree.map(jnp.add, carry, more), None

                one = jax.tree.map(lambda x: x[0], pieces)
                shapes = jax.eval_shape(gradients, state.params, one, totals, keys[0], state.frozen)
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                (grads, metrics), _ = jax.lax.scan(add, zeros, (pieces, keys))

        names = list(totals)
        metrics["loss"] = sum(metrics[name] for name in names)
        metrics["grad_norm"] = optax.global_norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        # Each device of `data` updates its part of every parameter, and then gathers the rest.
        spread = sharding.spread_over_data(shardings.params, state.params)
        grads, params = jax.lax.with_sharding_constraint((grads, state.params), (spread, spread))
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)

        def if_good(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(good, new, old)

        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(if_good, params, state.params),
            opt_state=jax.tree.map(if_good, opt_state, state.opt_state),
            consecutive_nonfinite=(state.consecutive_nonfinite + bad) * bad,
            bad_total=state.bad_total + bad,
            frozen=state.frozen,
        )
        return state, metrics | {"consecutive_nonfinite": state.consecutive_nonfinite, "bad_total": state.bad_total}

    batch_spec = sharding.batch_sharding(mesh)
    placed = {"in_shardings": (shardings, batch_spec, None), "out_shardings": (shardings, None)}
    options = compiler_options(mesh, module.cfg.d_model, vmem_kib)
    return jax.jit(step, donate_argnums=0, compiler_options=options, **placed)


def make_eval_step(module: nn.Module, objective: Objective, mesh: Mesh, param_shardings: Any):
    """Jitted: (params, batch) -> for every term its sums of nats, correct and weight."""

    def step(params: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
        def run(bound: nn.Module) -> Any:
            return objective.terms(bound, batch, True)

        with activation_shardings(sharding.activation_sharding_fn(mesh)):
            sums, weights = module.apply({"params": params}, method=run), objective.weights(batch)
        return {name: (term.nats, term.correct, weights[name]) for name, term in sums.items()}

    return jax.jit(step, in_shardings=(param_shardings, sharding.batch_sharding(mesh)))
