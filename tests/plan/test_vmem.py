"""plan --search tries other settings of VMEM."""

import types

from bothways.chips import Topology
from bothways.configs import find
from bothways.plan.training import search


def test_a_search_tries_other_vmem_with_the_best_layout(monkeypatch):
    """And only where a chip has some to give: v4 has not."""

    def made_up(recipe, topology, before):
        kib = recipe.mesh.vmem_kib
        slow = {0: 2.0, 32_768: 1.0, 65_536: 3.0}[kib] + recipe.mesh.sizes(topology.devices_count)["data"]
        known = {"step_seconds": 0.1, "scheduled_seconds": slow, "memory_per_chip": 1.0, "memory_limit": 2.0}
        return types.SimpleNamespace(fits=True, kib=kib, mfu_bound=1.0, mfu_expected=0.1, **known)

    monkeypatch.setattr("bothways.plan.training.plan", made_up)
    monkeypatch.setattr(Topology, "devices", lambda self: [])
    tried = {}
    for name in ("v5e:4x4", "v4:2x2x4"):
        tried[name] = search(find("gpt2_small"), Topology.parse(name), lambda _: None)
    assert tried["v5e:4x4"][0].kib == 32_768
    assert sorted({p.kib for p in tried["v5e:4x4"]}) == [0, 32_768, 65_536]
    assert {p.kib for p in tried["v4:2x2x4"]} == {0}
