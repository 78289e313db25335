"""The sums of a trace: phases by kernel name, forward and backward by thread, idle time by union."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import sloth_kernels
from integration_tests.benchmarks.training import kernel_phases

NAMES = {
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma": "attention",
    "pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention",
    "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT": "linear products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "linear products",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "dequantisation",
    "void kOptimizerStatic8bit2StateBlockwise<float, 1, 256, 1>": "optimizer",
    "Memcpy HtoD (Pinned -> Device)": "memory copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": "elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies and casts",
    "something_nobody_knows": "other",
}
OURS = {
    "_dequantize_kernel": "dequantisation",
    "_rope_kernel": "rotary embedding",
    "_cross_entropy_row_kernel": "loss",
    "_linear_cross_entropy_scale_kernel": "loss",
    "_rms_norm_forward_kernel": "norms",
    "_rms_norm_backward_kernel": "norms",
    "_rms_norm_sum_partials_kernel": "norms",
    "_glu_forward_kernel": "gated activation",
    "_glu_backward_kernel": "gated activation",
    "_glu_low_rank_backward_kernel": "gated activation",
    "_glu_contractions_kernel": "gated activation",
    "_adam_8bit_kernel": "optimizer",
    "_adam_32bit_kernel": "optimizer",
}


def test_kernels_of_ours_are_told_apart_by_name() -> None:
    """A trace shows nothing but the name: no two are called alike, and each belongs to a phase."""
    sources = [file.read_text() for file in Path(sloth_kernels.__path__[0]).rglob("*.py")]
    launched = [name for source in sources for name in re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", source)]
    assert sorted(launched) == sorted(OURS)


@pytest.mark.parametrize(("name", "phase"), [*NAMES.items(), *OURS.items()])
def test_phase_of(name: str, phase: str) -> None:
    assert kernel_phases.phase_of(name) == phase


def kernel(name: str, start: float, duration: float, correlation: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"correlation": correlation}}


def launch(thread: int, start: float, correlation: int) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "ts": start, "tid": thread, "args": {"correlation": correlation}}


EVENTS = [
    launch(9, 4, 2),
    launch(7, 0, 1),
    launch(7, 50, 3),
    kernel("gemm", 1, 10, 1),
    kernel("gemm", 6, 10, 2),
    kernel("adam", 60, 20, 3),
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 90},
]


def test_sums() -> None:
    sums = kernel_phases.summarise(EVENTS, 100)
    assert sums["phases"]["linear products"] == {"forward": 1e-5, "backward": 1e-5, "launches": 2}
    assert sums["phases"]["optimizer"] == {"forward": 2e-5, "backward": 0.0, "launches": 1}
    assert sums["busy_seconds"] == pytest.approx(35e-6)
    assert sums["idle_share"] == pytest.approx(0.65)
    assert sums["launches"] == 3
    assert sums["top"][0]["seconds"] == 2e-5
    (gap,) = sums["gaps"]
    assert (gap["at"], gap["seconds"]) == pytest.approx((15e-6, 44e-6))
    assert (gap["before"], gap["after"]) == ("gemm", "adam")


def test_table() -> None:
    text = kernel_phases.table(kernel_phases.summarise(EVENTS, 100))
    assert "| linear products | 0.0 | 0.0 | 20.0% | 2 |" in text
    assert "idle 65.0%" in text
    assert "| 0.04 | 0.0 | `gemm` | `adam` |" in text
