"""A job that trains nothing: steps, evaluations, checkpoints and signals of the real loop, and nothing to compile."""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bothways import sharding
from bothways.config import MeshConfig, TrainConfig
from bothways.train.step import TrainState
from bothways.train.steps import Job, Throughput


def counting(
    home: Path,
    cfg: TrainConfig,
    held: Callable[[int], float] = lambda step: 1 / (1 + step),
    bad: Callable[[int], bool] = lambda step: False,
    profile: int = 0,
) -> Job:
    """Its parameters are the number of steps behind them.

    Args:
      held: number of steps -> the held-out loss after them.
      bad: number of steps -> whether the last of them had no finite loss.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, {"x": jnp.zeros(3)}, {"m": jnp.zeros(5)}, zero, zero)

    def step(state: TrainState, batch: dict, seed: int):
        is_bad = int(bad(int(state.step) + 1))
        state = state.replace(
            step=state.step + 1,
            params={"x": state.params["x"] + 1},
            consecutive_nonfinite=(state.consecutive_nonfinite + is_bad) * is_bad,
            bad_total=state.bad_total + is_bad,
        )
        counters = {"consecutive_nonfinite": state.consecutive_nonfinite, "bad_total": state.bad_total}
        return state, {"loss": np.float32(1.0)} | counters

    return Job(
        home=home,
        cfg=cfg,
        mesh=mesh,
        shapes=jax.eval_shape(lambda: state),
        shardings=jax.tree.map(lambda x: x.sharding, state),
        begin=lambda: state,
        batches=lambda start: itertools.repeat({"tokens": np.zeros((cfg.batch_size, 2), np.int32)}),
        step=step,
        evaluate=lambda params: {"loss": held(int(params["x"][0]))},
        meter=Throughput(1.0),
        profile=profile,
    )
