"""What a plan may count on: the device's memory, the user's limits, the host's, and that all ranks agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests import child
from sloth_backend import SlothConfig, SlothConfigError, ranks
from sloth_backend.budget import (
    CONTEXT_BYTES,
    GIB,
    HOST_RESERVE_BYTES,
    DeviceMemory,
    device_budget,
    host_budget,
)

CUDA = torch.device("cuda:0")
LARGE = DeviceMemory(total=140 * GIB, free=100 * GIB, reserved=10 * GIB)


def budget(memory: DeviceMemory, **options: Any) -> float:
    """In GiB."""
    found = device_budget(CUDA, SlothConfig(**options), lambda device: memory)
    assert found is not None
    return found / GIB


@pytest.mark.parametrize(
    ("memory", "options", "expected"),
    [
        (LARGE, {}, 110 - 2),
        (DeviceMemory(20 * GIB, 10 * GIB, 0), {}, 10 * 0.95),
        (DeviceMemory(140 * GIB, 130 * GIB, 5 * GIB, share=0.25), {}, 35 * 0.95),
        (LARGE, {"vram_budget_gb": 16}, 15.4 * 0.95),
        (LARGE, {"vram_budget_gb": 500}, 110 - 2),
        (LARGE, {"vram_budget_gb": 0.5}, 0),
    ],
)
def test_the_least_limit_counts(memory: DeviceMemory, options: dict[str, Any], expected: float) -> None:
    assert budget(memory, **options) == pytest.approx(expected, abs=1e-6)


def test_other_devices_have_no_limit() -> None:
    config = SlothConfig(vram_budget_gb=16)
    assert device_budget(torch.device("cpu"), config) is None
    assert device_budget(None, config) is None
    assert CONTEXT_BYTES < GIB


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    left = HOST_RESERVE_BYTES + 8 * GIB
    assert host_budget(lambda: left) == 4 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_budget(lambda: left) == GIB
    assert host_budget(lambda: HOST_RESERVE_BYTES // 2) == 0
    assert host_budget(lambda: None) == 0


RANK = """
import sys
import torch.distributed as dist
from sloth_backend import ranks
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(ranks.least((rank + 3) << 33), ranks.least(None), ranks.everywhere(rank == 0), ranks.everywhere(rank < 2))
dist.destroy_process_group()
"""


def test_ranks_agree_on_the_least_budget(tmp_path: Path) -> None:
    done = child.fork(*(child.Start(RANK, (rank, tmp_path / "meeting")) for rank in range(2)), timeout=120)
    assert [process.stdout.split() for process in done] == [[str(3 << 33), "None", "False", "True"]] * 2, done
    assert ranks.least(7) == 7


@pytest.mark.parametrize("value", [0, -1, "nan", "inf", "much"])
def test_a_budget_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(SlothConfigError, match=r"option 'vram_budget_gb' got"):
        SlothConfig.parse({"vram_budget_gb": value})


def test_memory_options() -> None:
    assert (SlothConfig().memory, SlothConfig().vram_budget_gb) == ("auto", None)
    config = SlothConfig.parse({"memory": "least", "vram_budget_gb": 16})
    assert config == SlothConfig(memory="least", vram_budget_gb=16.0)
    with pytest.raises(SlothConfigError, match=r"option 'memory' got 'most': .*'auto', 'least' or 'fastest'"):
        SlothConfig.parse({"memory": "most"})
