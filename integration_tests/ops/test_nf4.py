"""4-bit dequantisation against bitsandbytes, to the bit, and what it promises beside."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from integration_tests.four_bit import from_bitsandbytes
from sloth_kernels import launch
from sloth_kernels.op import Case
from sloth_kernels.ops import nf4

DEVICE = torch.device("cpu" if launch.interpreting() else "cuda")
KERNEL_DTYPES = launch.INTERPRETER_DTYPES if launch.interpreting() else launch.TRITON_DTYPES
BLOCKSIZES = (64, 128, 4096) if launch.interpreting() else (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = [(130, 72), (65, 66), (3, 8), (37, 41)]
GPU_SHAPES = [(1024, 4096), (14336, 4096), (4097, 1001)]


def _quantize(
    shape: tuple[int, ...], dtype: torch.dtype, blocksize: int = 64, quant_type: str = "nf4", **options: Any
) -> tuple[torch.Tensor, Any]:
    """Weights of very different sizes: blocks of nothing but zeros, of 1e-23 and of 1e4 beside usual ones."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(shape, device=DEVICE, generator=generator)
    sizes = torch.tensor([1.0, 1.0, 0.02, 0.0, 1e-23, 1e4], device=DEVICE)
    weight *= sizes[torch.arange(len(weight), device=DEVICE) % len(sizes)][:, None]
    return bnb.quantize_4bit(weight.to(dtype), blocksize=blocksize, quant_type=quant_type, **options)


def _assert_equal_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal, with a zero's sign the only freedom: bitsandbytes' FP4 table and its kernels disagree about it."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@pytest.mark.parametrize("dtype", launch.TRITON_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_equals_bitsandbytes(blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, launches: Any) -> None:
    shapes = SHAPES if launch.interpreting() else [*SHAPES, *GPU_SHAPES]
    for shape in shapes:
        packed, state = _quantize(shape, dtype, blocksize, quant_type, compress_statistics=nested)
        quantized = from_bitsandbytes(packed, state)
        before = launches.count
        ours = nf4.dequantize_4bit(*quantized, dtype=dtype)
        assert launches.count - before == (dtype in KERNEL_DTYPES)
        with torch.compiler.set_stance("force_eager"):  # on a CPU bitsandbytes compiles its path for odd rows
            _assert_equal_bits(ours, bnb.dequantize_4bit(packed, state))
        _assert_equal_bits(ours, nf4.reference(*quantized, dtype=dtype))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("shape", "room"), [((65, 72), 8), ((3, 1024), 24), ((33, 40), 3), ((37, 41), 7)])
def test_rows_apart(shape: tuple[int, int], room: int, nested: bool) -> None:
    """What lies behind the rows stays as it is; rows that are no whole words take the reference."""
    for dtype in KERNEL_DTYPES:
        packed, state = _quantize(shape, dtype, compress_statistics=nested)
        quantized = from_bitsandbytes(packed, state)
        wide = torch.full((shape[0], shape[1] + room), 7.0, dtype=dtype, device=DEVICE)
        nf4.forward(quantized, wide[:, : shape[1]])
        assert torch.equal(wide[:, : shape[1]], nf4.reference(*quantized, dtype=dtype))
        assert (wide[:, shape[1] :] == 7.0).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtypes(storage: torch.dtype) -> None:
    packed, state = _quantize((48, 40), torch.float16, quant_storage=storage, compress_statistics=True)
    assert packed.dtype == storage
    ours = nf4.dequantize_4bit(*from_bitsandbytes(packed, state), dtype=torch.float16)
    _assert_equal_bits(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("case", nf4.cases(), ids=lambda case: case.name)
def test_cases_equal_the_reference(case: Case, launches: Any) -> None:
    for dtype in KERNEL_DTYPES:
        args, kwargs = case.make(dtype, DEVICE)
        assert torch.equal(nf4.dequantize_4bit(*args, **kwargs), nf4.reference(*args, **kwargs))
    assert launches.count == len(KERNEL_DTYPES)


def test_rounds_once_from_float32() -> None:
    """A weight quantised from bfloat16 comes back in float16 or float32 without a detour over bfloat16."""
    packed, state = _quantize((64, 64), torch.bfloat16)
    quantized = from_bitsandbytes(packed, state)
    exact = nf4.dequantize_4bit(*quantized, dtype=torch.float32)
    assert not torch.equal(exact, exact.to(torch.bfloat16).float())
    assert torch.equal(nf4.dequantize_4bit(*quantized, dtype=torch.float16), exact.half())


def test_writes_into_a_part_of_a_buffer() -> None:
    packed, state = _quantize((6, 24), torch.float16)
    buffer = torch.full((10, 24), 7.0, dtype=torch.float16, device=DEVICE)
    out = nf4.dequantize_4bit(*from_bitsandbytes(packed, state), dtype=torch.float16, out=buffer[2:8])
    assert out.data_ptr() == buffer[2].data_ptr()
    _assert_equal_bits(buffer[2:8], bnb.dequantize_4bit(packed, state))
    assert (buffer[:2] == 7).all()
    assert (buffer[8:] == 7).all()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_packed_bytes_at_any_address(offset: int) -> None:
    packed, state = _quantize((66, 64), torch.float32)
    shifted = torch.zeros(packed.numel() + offset, dtype=torch.uint8, device=DEVICE)[offset:].copy_(packed.flatten())
    ours = nf4.dequantize_4bit(*from_bitsandbytes(shifted, state), dtype=torch.float32)
    _assert_equal_bits(ours, bnb.dequantize_4bit(packed, state))


def test_blocks_that_no_kernel_takes(launches: Any) -> None:
    packed = torch.tensor([0x01, 0x2F, 0xF0], dtype=torch.uint8, device=DEVICE)
    absmax = torch.tensor([1.0, 10.0], device=DEVICE)
    code = torch.arange(16.0, device=DEVICE)
    weight = nf4.dequantize_4bit(packed, absmax, code, (2, 3), 3, dtype=torch.float32)
    assert weight.tolist() == [[0, 1, 2], [150, 150, 0]]
    assert launches.count == 0


def test_no_weights(launches: Any) -> None:
    empty, code = torch.empty(0, device=DEVICE), torch.arange(16.0, device=DEVICE)
    weight = nf4.dequantize_4bit(empty.to(torch.uint8), empty, code, (0, 64), 64, dtype=torch.float16)
    assert weight.shape == (0, 64)
    assert launches.count == 0


def test_errors_name_the_tensor() -> None:
    args, kwargs = nf4.cases()[0].make(torch.float32, DEVICE)
    quantized = nf4.Quantized4bit(*args)
    broken = {
        "needs 7680 contiguous bytes of packed": {"packed": quantized.packed[1:]},
        "needs 240 contiguous values of absmax": {"absmax": quantized.absmax[::2]},
        "needs 16 contiguous values of code": {"code": quantized.code[:8]},
        "needs 1 contiguous values of nested_absmax": {"nested_absmax": torch.zeros(2, device=DEVICE)},
        "also needs nested_code": {"nested_code": None},
        "got sizes 0 and 256": {"blocksize": 0},
    }
    for message, change in broken.items():
        with pytest.raises(ValueError, match=message):
            nf4.dequantize_4bit(*quantized._replace(**change), **kwargs)
    with pytest.raises(ValueError, match="out must be contiguous"):
        nf4.dequantize_4bit(*quantized, **kwargs, out=torch.empty(160, 96, device=DEVICE).t())
