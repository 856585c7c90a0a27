"""Eight fake CPU devices, quick compilation, and a cache of what was compiled. Set before JAX is imported."""

import contextlib
import gc
import importlib.util
import mmap
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"


def jaxlib_knows(flag: str) -> bool:
    """Whether XLA has this flag: one that it has not ends the process."""
    library = Path(importlib.util.find_spec("jaxlib").origin).parent / "libjax_common.so"
    if not library.exists():
        return False
    with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(flag.encode()) >= 0


# Programs of XLA's older emitters take half as long to compile; tiny ones are not worth splitting between threads.
FLAGS = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
QUICK = " ".join(f"--{flag}={value}" for flag, value in FLAGS.items() if jaxlib_knows(flag))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# Tiny programs run a few times: compiling them well takes ten times as long as running them badly.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Two workers share two cores: products of tiny matrices would only wait for one another's threads.
for library in ("OMP", "MKL", "OPENBLAS", "RAYON"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import dataclasses

import jax
import pytest

import bothways
from bothways import sharding
from bothways.config import MeshConfig, OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.train import step
from bothways.train.report import Reporter
from tests.corpus import made_up_text

# Recipes that leave the type open train in float32 on every machine.
step.multiplies_bfloat16 = lambda: False

HERE = Path(__file__).parent
HANGS = 600
"""Seconds after which what a test waits for is taken to hang: a slow machine with other work needs a minute for much."""
PARITY = HERE / "convert"
BUILT_FROM_SOURCE = "llama-cpp-python"
"""May be absent in CI, where building it would take as long as a quarter of the tests."""
LONGEST = (
    "test_hosts.py",
    "serve/test_endpoints.py",
    "train/test_step.py",
    "test_commands.py",
    "test_as_users.py",
    "convert/test_real.py",
    "convert/test_own.py",
    "sample/test_blocks.py",
)
"""Files that take longest, which workers begin with: one of them last would keep the others waiting."""


def pytest_collection_modifyitems(items):
    order = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish():
    """What all modules hold is never looked through again for garbage: some million objects of torch and JAX."""
    gc.collect()
    gc.freeze()


def no_skip_of_parity(report, path: Path):
    """In CI the comparisons with transformers must run: there a skipped one has failed."""
    if (
        report.skipped
        and os.environ.get("CI") == "true"
        and path.is_relative_to(PARITY)
        and not hasattr(report, "wasxfail")
        and BUILT_FROM_SOURCE
        not in (why := str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))
    ):
        report.outcome, report.longrepr = "failed", f"in CI this must run, and it was left out: {why}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return no_skip_of_parity((yield), item.path)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return no_skip_of_parity((yield), collector.path)


# Every size another prime (or a product of one with what it must divide), so that a swapped axis cannot pass.
TINY = TransformerConfig(
    vocab_size=37,
    context_length=23,
    n_layers=3,
    d_model=22,
    n_heads=2,
    d_head=6,
    d_ff=26,
    init="fan_in",
    init_std=0.5,
    init_residual="same",
    dtype="float32",
).resolved()


@pytest.fixture(scope="session")
def tiny() -> TransformerConfig:
    """A transformer small enough to compile in a second."""
    return TINY


@pytest.fixture
def tiny_with(tiny):
    """The tiny configuration with some fields replaced."""
    return lambda **fields: dataclasses.replace(tiny, **fields).resolved()


@pytest.fixture(scope="session")
def eight_devices() -> list:
    devices = jax.devices()
    assert len(devices) == 8, "the tests need 8 fake CPU devices; conftest.py must be imported before jax"
    return devices


@pytest.fixture(scope="module")
def compiled_well():
    """As users compile: for programs that are large, or run for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def on_one_device():
    """In here training sees one of the eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh, devices = sharding.make_mesh, jax.devices()[:1]
        patch.setattr(sharding, "make_mesh", lambda cfg: make_mesh(cfg, devices))
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def loaded_once():
    """A run that has not changed since it was loaded is not loaded again."""
    load, kept = bothways.load, {}

    def once(run, *args, **named):
        files = sorted((str(path), path.stat().st_mtime_ns) for path in Path(run).rglob("*"))
        key = repr((files, args, named))
        if not files or key not in kept:  # of what is no run nothing is kept: it is refused
            kept[key] = load(run, *args, **named)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bothways, "load", once)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Training sees one of the eight devices, where the mesh is not what is asked about."""
    with on_one_device():
        yield


@pytest.fixture(scope="session", autouse=True)
def programs_once():
    """What runs of the same recipe compile is compiled once."""
    from tests.programs import kept_programs

    with kept_programs():
        yield


PLOT = Reporter.plot


@contextlib.contextmanager
def plotting(how=PLOT):
    """Runs in here draw loss.png."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "plot", how)
        yield


@pytest.fixture(scope="session", autouse=True)
def without_plots():
    """A plot takes as long as a short run, so that none is drawn but those that are looked at."""
    with plotting(lambda self: None):
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A file with a small made-up language."""
    path = tmp_path_factory.mktemp("corpus") / "tale.txt"
    path.write_text(made_up_text())
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Where prepared data is kept during the tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_recipe(tiny, text_file, cache_dir) -> Recipe:
    """A run of six steps that trains on one device in a second or two."""
    return Recipe(
        name="tiny",
        model=dataclasses.replace(
            tiny, vocab_size=0, context_length=16, n_layers=2, scan_layers=True, dropout_residual=0.1
        ),
        data=DataConfig(corpus=str(text_file), tokenizer="unigram", vocab_size=320, cache=str(cache_dir)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(steps=6, batch_size=8, eval_every=3, eval_rows=8, save_every=3, log_every=1),
        mesh=MeshConfig(),
    )
