"""The parts under offloaded checkpointing: arena, host memory and ring."""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from integration_tests.plugins.lazy_device import LazyDevice
from sloth_backend.budget import HOST_RESERVE_BYTES, available_bytes
from sloth_plugins.offloaded_checkpointing.arena import ALIGNMENT, Arena, Block, align
from sloth_plugins.offloaded_checkpointing.host_memory import HostMemory, map_pages
from sloth_plugins.offloaded_checkpointing.ring import Ring, is_dense

SIZES = st.integers(min_value=1, max_value=5000)


@settings(max_examples=200, deadline=None)
@given(segments=st.lists(SIZES, min_size=1, max_size=4), steps=st.lists(st.tuples(st.booleans(), SIZES), max_size=60))
def test_arena_blocks_never_overlap_and_gaps_merge(segments: list[int], steps: list[tuple[bool, int]]) -> None:
    arena = Arena()
    sizes = {arena.add(align(size)): align(size) for size in segments}
    taken: list[Block] = []
    for gives, number in steps:
        if gives and taken:
            arena.give(taken.pop(number % len(taken)))
        elif (block := arena.take(number)) is not None:
            assert block.size == align(number) < number + ALIGNMENT
            assert block.offset % ALIGNMENT == 0
            assert 0 <= block.offset <= sizes[block.segment] - block.size
            taken.append(block)
        spans = sorted((b.segment, b.offset, b.offset + b.size) for b in taken)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))
        assert arena.used == sum(block.size for block in taken)
    for block in taken:
        arena.give(block)
    assert [arena.take(size) for size in sizes.values()] == [Block(s, 0, size) for s, size in sizes.items()]


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 40), size=SIZES)
def test_arena_wastes_nothing_on_equal_blocks(count: int, size: int) -> None:
    arena = Arena()
    arena.add(count * align(size))
    for _ in range(3):
        blocks = [arena.take(size) for _ in range(count)]
        assert None not in blocks
        assert arena.take(size) is None
        for block in reversed(blocks):
            assert block is not None
            arena.give(block)


def test_arena_takes_back_only_what_is_taken() -> None:
    arena = Arena()
    segment = arena.add(1024)
    block = arena.take(300)
    assert block == Block(segment, 0, 512)
    with pytest.raises(ValueError, match="still taken"):
        arena.remove(segment)
    arena.give(block)
    for wrong in (block, Block(segment, 512, 1024), Block(7, 0, 256), Block(segment, 0, 0)):
        with pytest.raises(ValueError, match="is not taken"):
            arena.give(wrong)
    assert arena.empty_below(1024) == []
    assert arena.empty_below(1025) == [segment]
    arena.remove(segment)
    assert arena.capacity == 0


def test_memory_grows_by_what_a_pass_needs_and_is_reused() -> None:
    device = LazyDevice()
    memory = HostMemory(device, segment_bytes=1 << 20, available=lambda: None)
    nbytes = 100_000
    for _ in range(3):
        blocks = [memory.take(nbytes, 31 - layer) for layer in range(31)]
        assert memory.bytes_held == sum(device.pinned.values()) <= 1.05 * 31 * nbytes
        assert len(device.pinned) == 4
        for block in blocks:
            assert block is not None
            memory.give(block)
    assert memory.bytes_used == 0


def test_memory_too_small_for_longer_rows_goes_back() -> None:
    device = LazyDevice()
    memory = HostMemory(device, available=lambda: None)
    for nbytes in (4096, 400_000, 40_000, 399_999):
        blocks = [memory.take(nbytes, 8 - layer) for layer in range(8)]
        for block in blocks:
            assert block is not None
            memory.give(block)
    assert memory.bytes_held == sum(device.pinned.values()) <= 8 * 400_000 + 8 * mmap.PAGESIZE


def test_memory_blocks_are_apart_and_page_aligned() -> None:
    memory = HostMemory(LazyDevice(), available=lambda: None)
    blocks = [memory.take(nbytes) for nbytes in (1000, 5000, 300)]
    for number, block in enumerate(blocks):
        assert block is not None
        memory.view(block, 300).fill_(number)
    assert [int(memory.view(block, 300).unique()) for block in blocks if block] == [0, 1, 2]


def test_memory_leaves_the_host_its_reserve() -> None:
    left = HOST_RESERVE_BYTES + 20_000
    memory = HostMemory(LazyDevice(), available=lambda: left)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.take(10_000, blocks_to_come=30) is not None
    left = HOST_RESERVE_BYTES
    with pytest.warns(RuntimeWarning, match="no memory left"):
        assert memory.take(10_000, blocks_to_come=29) is None
    assert map_pages(1 << 62) is None


def test_memory_that_cannot_be_pinned_is_pageable_and_says_so() -> None:
    device = LazyDevice(refuses_to_pin=True)
    memory = HostMemory(device, available=lambda: None)
    with pytest.warns(RuntimeWarning, match="could not be pinned"):
        assert memory.take(1000) is not None
    del memory
    assert not device.pinned


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(MADV_WIPEONFORK) is Linux's")
def test_a_forked_child_gets_no_copy_of_the_pages() -> None:
    pages = map_pages(10_000)
    assert pages is not None
    assert (pages.nbytes, pages.data_ptr() % mmap.PAGESIZE) == (-(-10_000 // mmap.PAGESIZE) * mmap.PAGESIZE, 0)
    pages.fill_(7)
    address = pages.data_ptr()
    child = os.fork()
    if child == 0:
        os._exit(ctypes.string_at(address, 1)[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pages.unique().tolist() == [7]


def test_memory_is_unpinned_by_its_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LazyDevice()
    memory = HostMemory(device, available=lambda: None)
    memory.take(1000)
    assert len(device.pinned) == 1
    del memory
    assert not device.pinned
    memory = HostMemory(device, available=lambda: None)
    memory.take(1000)
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    del memory
    assert len(device.pinned) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n"}, 7 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 900 kB\n",
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "5000\n",
                "sys/fs/cgroup/job/memory.current": "4000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 700\nactive_file 50\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "4000\n",
            },
            1750,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "300\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
            },
            200,
        ),
    ],
)
def test_available_bytes(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == expected


def make_ring() -> tuple[LazyDevice, Ring]:
    device = LazyDevice()
    return device, Ring(device, HostMemory(device, available=lambda: None))


def test_ring_brings_the_next_tensor_home_early() -> None:
    device, ring = make_ring()
    handles = [ring.save([torch.full((8,), float(layer))], 4 - layer)[0] for layer in range(4)]
    assert [handle.source is None for handle in handles] == [True, True, True, False]
    for layer in (3, 2, 1, 0):
        assert handles[layer].restore().tolist() == [float(layer)] * 8
        assert device.copies["homeward"] == min(3, 4 - layer)
    assert not device.violations


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ring_restores_values_strides_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, ring = make_ring()
    base = torch.randn(2, *shape).to(dtype)
    tensors = [base[1], base[0].transpose(0, -1), base.movedim(0, -1)]
    kept = [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]
    assert all(map(is_dense, tensors))
    handles = ring.save(tensors, 1)
    ring.save([torch.zeros(3)], 0)
    for handle, expected in zip(handles, kept, strict=True):
        restored = handle.restore()
        assert handle.source is None
        assert (restored.dtype, restored.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(restored, expected)


def test_ring_reuses_a_block_only_after_its_last_copy() -> None:
    device, ring = make_ring()
    first = ring.save([torch.full((8,), 1.0)], 1)[0]
    last = ring.save([torch.full((8,), 9.0)], 0)[0]
    last.restore()
    restored = first.arrived
    assert restored is not None
    waiting = first.arrived[0]
    first.arrived = None
    del first, last
    second = ring.save([torch.full((8,), 2.0)], 1)[0]
    assert ring.memory.bytes_used == ALIGNMENT
    device.synchronize()
    assert waiting.tolist() == [1.0] * 8
    del second


def test_ring_frees_memory_behind_copies_in_flight() -> None:
    device, ring = make_ring()
    first = ring.save([torch.randn(8)], 2)[0]
    last = ring.save([torch.randn(8)], 1)[0]
    last.restore()
    assert first.arrived is not None
    del first, last
    device.synchronize()
    assert not device.violations
    assert ring.memory.bytes_used == 0


def test_ring_leaves_what_several_layers_share_on_the_device() -> None:
    device, ring = make_ring()
    shared = torch.randn(8)
    layers = [ring.save([torch.randn(8), shared], 4 - layer) for layer in range(3)]
    last = ring.save([torch.randn(8)], 1)
    assert layers[0][1] is layers[1][1] is layers[2][1]
    assert device.copies == {"outward": 5, "homeward": 0}
    assert torch.equal(layers[0][1].restore(), shared)
    assert layers[0][1].restore().data_ptr() == shared.data_ptr()
    shared.add_(1)
    (again,) = ring.save([shared], 1)
    assert again is not layers[0][1]
    del last


def test_ring_serves_several_threads() -> None:
    _, ring = make_ring()
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(50):
            tensors = [torch.full((16,), float(1000 * number + step * 4 + layer)) for layer in range(4)]
            expected = [float(tensor[0]) for tensor in tensors]
            handles = [ring.save([tensors.pop(0)], 4 - layer)[0] for layer in range(4)]
            for handle, value in zip(reversed(handles), reversed(expected), strict=True):
                wrong.extend([number] if handle.restore().tolist() != [value] * 16 else [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert ring.memory.bytes_used == 0
