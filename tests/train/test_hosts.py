"""How a process joins others, and what they must have in common. tests/test_hosts.py runs real ones."""

import jax
import numpy as np
import pytest

from bothways.errors import InputError
from bothways.train import hosts


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with; it does nothing else."""
    output = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: output.update(kwargs))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    return output


def test_flags_and_environment_say_the_same(joined, monkeypatch):
    hosts.start(hosts.HostsConfig("a:1", 4, 2))
    flags = dict(joined)
    assert (flags["coordinator_address"], flags["num_processes"], flags["process_id"]) == ("a:1", 4, 2)
    for name, value in (("JAX_COORDINATOR_ADDRESS", "a:1"), ("JAX_NUM_PROCESSES", "4"), ("JAX_PROCESS_ID", "2")):
        monkeypatch.setenv(name, value)
    joined.clear()
    hosts.start(hosts.HostsConfig())
    assert joined == flags


def test_where_nothing_is_said_the_cluster_is_asked(joined):
    hosts.start(hosts.HostsConfig())
    assert [joined[name] for name in ("coordinator_address", "num_processes", "process_id")] == [None] * 3
    joined.clear()
    hosts.start(hosts.HostsConfig(count=1))
    assert joined == {}


def test_no_cluster_is_one_process(monkeypatch, joined):
    def none(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none)
    hosts.start(hosts.HostsConfig())
    with pytest.raises(InputError, match="coordinator=a:1 count=None"):
        hosts.start(hosts.HostsConfig("a:1"))


def test_processes_that_differ_are_refused_by_what_differs(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = [0, 0]

    def gather(mine):
        return np.stack([mine, mine + np.array(other, np.uint32)])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    hosts.assert_equal_across_hosts({"recipe": "a", "tokenizer": "b"})
    other[1] = 1
    with pytest.raises(InputError, match="the 2 processes differ in tokenizer;"):
        hosts.assert_equal_across_hosts({"recipe": "a", "tokenizer": "b"})
