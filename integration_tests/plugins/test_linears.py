"""Linears as the ops take them, and PEFT's layers patched one by one, against PEFT's own forward."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from integration_tests import numbers
from integration_tests.peft_layers import Siblings, linears_of, siblings
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_kernels.frozen_weight import Weight4bit
from sloth_kernels.ops.lora import OP, lora_linears
from sloth_kernels.registry import load_ops
from sloth_plugins.kernel_patching import linears
from sloth_plugins.kernel_patching.linears import LiveLinear
from sloth_plugins.kernel_patching.lora import patch_linears

CPU = torch.device("cpu")
OPS = {op.name: op for op in load_ops()}


def _patch(
    model: nn.Module, edits: Edits | None = None, taken: Sequence[nn.Module] = (), **config: Any
) -> list[Finding]:
    run = Run("user", SlothConfig(**config))
    return patch_linears(model, run, OPS, Edits() if edits is None else edits, set(taken))


def _model(**options: Any) -> Siblings:
    return siblings(64, [48, 32], options.pop("dtype", torch.float32), device=CPU, **options)


def _x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def _trained(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _evaluate(model: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """Outputs, then the gradients of x and of what trains, under one seed."""
    torch.manual_seed(5)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        ys = numbers.as_tuple(model(x))
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *_trained(model)], upstream)]


def _in_float64(model: nn.Module) -> nn.Module:
    """PEFT's own layers over the same values."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, LoraLayer) and isinstance(base := layer.get_base_layer(), bnb.nn.Linear4bit):
            weight: Any = base.weight
            dense = nn.Linear(base.in_features, base.out_features, bias=False)
            dense.weight = nn.Parameter(dequantize_4bit(weight.data, weight.quant_state), requires_grad=False)
            dense.bias = base.bias
            layer.base_layer = dense
    return twin.double()


def _assert_numbers(
    ours: Sequence[torch.Tensor], stock: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], tolerance: float
) -> None:
    for mine, theirs, true in zip(ours, stock, truth, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        size = true.norm()
        assert (mine - true).norm() / size <= (theirs - true).norm() / size + tolerance


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "autocast"),
    [
        (torch.float32, {}, None),
        (torch.float32, {"bias": True, "ranks": [8, 3], "rslora": True}, None),
        (torch.float32, {"dropout": 0.3, "ranks": [8, 3]}, None),
        (torch.bfloat16, {"bias": True}, None),
        (torch.bfloat16, {"adapter_dtype": torch.float32, "dropout": 0.3}, None),
        (torch.bfloat16, {"adapter_dtype": torch.float32, "bias": True}, torch.bfloat16),
        (torch.float32, {"dropout": 0.3}, torch.bfloat16),
        (torch.float32, {"in_4bit": True, "bias": True}, None),
        (torch.float32, {"in_4bit": True, "quant_type": "fp4", "ranks": [8, 3], "dropout": 0.3}, None),
        (torch.float32, {"in_4bit": True, "compress_statistics": False}, None),
    ],
    ids=str,
)
def test_patched_layers_obey_the_numbers_rule(
    dtype: torch.dtype, options: dict[str, Any], autocast: torch.dtype | None
) -> None:
    model, x = _model(dtype=dtype, **options), _x(dtype)
    stock = _evaluate(model, x, autocast)
    truth = _evaluate(_in_float64(model), x.detach().double().requires_grad_())
    findings = _patch(model)
    assert [finding.action for finding in findings] == ["changed", "changed"]
    _assert_numbers(_evaluate(model, x, autocast), stock, truth, OP.tolerance[autocast or dtype])


@pytest.mark.parametrize("in_4bit", [False, True])
def test_reads_what_is_there(in_4bit: bool) -> None:
    model = _model(in_4bit=in_4bit, bias=True, ranks=[8, 4], dropout=0.1)
    for layer, expected in zip(model.linears, linears_of(model), strict=True):
        live = LiveLinear.of(layer)
        assert isinstance(live, LiveLinear)
        assert live.obstacle() is None
        assert live.in_4bit == in_4bit
        linear = live.read()
        assert linear.bias_N is expected.bias_N
        assert [tuple(map(id, a[:2])) + a[2:] for a in linear.adapters] == [
            tuple(map(id, a[:2])) + a[2:] for a in expected.adapters
        ]
        assert torch.equal(linear.weight.dense(torch.float32), expected.weight.dense(torch.float32))
        assert live.read().weight is linear.weight


def test_plain_linears() -> None:
    linear, conv = nn.Linear(8, 6), Conv1D(6, 8)
    quantised = _model(in_4bit=True, ranks=[]).linears[0]
    for module in (linear, conv.requires_grad_(False), quantised):
        live = LiveLinear.of(module)
        assert isinstance(live, LiveLinear)
        x = torch.randn(3, live.read().weight.shape[1])
        torch.testing.assert_close(lora_linears(x, (live.read(),))[0], module(x))
    assert LiveLinear.of(linear).describe() == "trained float32 weight"  # type: ignore[union-attr]
    assert LiveLinear.of(quantised).describe() == "frozen 4-bit weight (nf4, double-quantised)"  # type: ignore[union-attr]


def test_replaced_parameters_are_read_anew() -> None:
    """As sharding replaces them between two calls."""
    linear = nn.Linear(8, 6)
    live = LiveLinear.of(linear)
    assert isinstance(live, LiveLinear)
    for _ in range(2):
        linear.weight, linear.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        linear_now = live.read()
        assert linear_now.weight.trained is linear.weight
        assert linear_now.bias_N is linear.bias
    del linear._parameters["weight"]
    assert live.obstacle() == "its weight is no parameter"


def test_4bit_weights_that_move_are_read_anew() -> None:
    module: Any = _model(in_4bit=True, ranks=[]).linears[0]
    live = LiveLinear.of(module)
    assert isinstance(live, LiveLinear)
    before = live.read().weight
    module.weight.data = module.weight.data.clone()
    moved = live.read().weight
    assert isinstance(moved, Weight4bit)
    assert moved is not before
    assert moved.quantized.packed.data_ptr() == module.weight.data_ptr()
    state = module.weight.quant_state
    state.absmax = state.absmax.clone()
    latest = live.read().weight
    assert isinstance(latest, Weight4bit)
    assert latest.quantized.absmax is state.absmax
    del module.weight.quant_state  # what sharding does; the module keeps the state
    module.quant_state = state
    assert live.obstacle() is None
    assert live.read().weight is latest
    state.packing_format_for_cpu = True
    assert "packed" in str(live.obstacle())


# Changes during a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_4bit", [False, True])
def test_follows_what_peft_does(in_4bit: bool) -> None:
    """Patched and stock stay together through every switch, and PEFT's own path runs where ours cannot."""
    stock = _model(in_4bit=in_4bit, ranks=[8, 4])
    ours = copy.deepcopy(stock)
    _patch(ours)
    x = _x()

    def both(change: Callable[[Any], None]) -> None:
        for layer in (*stock.linears, *ours.linears):
            change(layer)

    def everywhere(change: Callable[[Any], None]) -> None:
        both(change)
        for mine, theirs in zip(_evaluate(ours, x), _evaluate(stock, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    everywhere(lambda layer: None)
    everywhere(lambda layer: layer.set_adapter("adapter_1"))
    everywhere(lambda layer: layer.set_scale("adapter_1", 3.0))
    everywhere(lambda layer: layer.set_adapter(["adapter_1", "adapter_0"]))
    everywhere(lambda layer: layer.set_adapter("adapter_0"))
    both(lambda layer: layer.enable_adapters(False))
    torch.testing.assert_close(ours(x), stock(x))
    everywhere(lambda layer: layer.enable_adapters(True))
    if not in_4bit:
        both(lambda layer: layer.merge())
        torch.testing.assert_close(ours(x), stock(x))
        everywhere(lambda layer: layer.unmerge())
    everywhere(lambda layer: layer.delete_adapter("adapter_1"))


def test_obstacles_name_what_changed() -> None:
    model = _model(ranks=[8, 4])
    layer: Any = model.linears[0]
    live = LiveLinear.of(layer)
    assert isinstance(live, LiveLinear)
    layer.enable_adapters(False)
    assert live.obstacle() == "its adapters are disabled"
    layer.enable_adapters(True)
    layer.merge()
    assert live.obstacle() == "its adapters are merged"
    layer.unmerge()
    handle = layer.register_forward_pre_hook(lambda module, args: None)
    assert live.obstacle() == "has hooks"
    handle.remove()
    layer.cast_input_dtype_enabled = False
    assert "casts" in str(live.obstacle())
    layer.cast_input_dtype_enabled = True
    assert live.obstacle() is None
    layer.lora_A["adapter_0"].bias = nn.Parameter(torch.zeros(8))
    fresh = LiveLinear.of(layer)
    assert isinstance(fresh, str)
    assert "lora_bias" in fresh


def test_other_arguments_go_to_peft() -> None:
    model, x = _model(ranks=[8, 4]), _x()
    layer: Any = model.linears[0]
    layer.eval()
    names = ["adapter_0", "__base__", "adapter_1"]
    expected = layer(x, adapter_names=names)
    _patch(model)
    assert torch.equal(layer(x, adapter_names=names), expected)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[:1])


def test_dropout_only_while_training() -> None:
    model, x = _model(dropout=0.5), _x()
    _patch(model)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_compute_with_their_own_weights() -> None:
    model, x = _model(), _x()
    _patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model(x)[0].any()
    assert twin(x)[0].any()


def test_undo_restores_every_attribute() -> None:
    model, edits = _model(in_4bit=True), Edits()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    _patch(model, edits)
    assert any("_sloth_linear" in vars(module) for module in model.modules())
    edits.rollback()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


# Reasons --------------------------------------------------------------------------------------------------------------


def _adapted(**options: Any) -> Any:
    model: Any = nn.Sequential(nn.Linear(16, 16))
    inject_adapter_in_model(LoraConfig(target_modules=["0"], **options), model)
    return model[0]


def _adapted_by_ia3() -> Any:
    model: Any = nn.Sequential(nn.Linear(4, 4))
    inject_adapter_in_model(IA3Config(target_modules=["0"], feedforward_modules=["0"]), model)
    return model[0]


def _trained_4bit() -> Any:
    """Only a storage dtype that floats lets anyone ask for it."""
    module: Any = _model(in_4bit=True, ranks=[], quant_storage=torch.float32).linears[0]
    module.weight.requires_grad_(True)
    return module


def _with(module: Any, change: Callable[[Any], Any]) -> Any:
    change(module)
    return module


class _OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def _reasons() -> dict[str, tuple[str, Any]]:
    hook = lambda module, args: None
    return {
        "dora": ("DoraLinearVariant, not plain LoRA", _adapted(use_dora=True)),
        "lora_bias": ("bias of its own (lora_bias)", _adapted(lora_bias=True)),
        "8-bit": ("its weight is 8-bit", bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)),
        "4-bit, not quantised": ("not quantised yet", bnb.nn.Linear4bit(16, 16)),
        "meta": ("not quantised yet", bnb.nn.Linear4bit(16, 16, device="meta")),
        "4-bit that trains": ("4-bit weight requires a gradient", _trained_4bit()),
        "other class": ("is a Conv2d", nn.Conv2d(1, 1, 1)),
        "subclass": ("is a _OwnForward", _OwnForward(4, 4)),
        "hooks": ("has hooks", _with(nn.Linear(4, 4), lambda m: m.register_forward_pre_hook(hook))),
        "base hooks": (
            "its base layer has hooks",
            _with(_adapted(), lambda m: m.base_layer.register_forward_hook(hook)),
        ),
        "adapter hooks": (
            "in adapter 'default' a part has hooks",
            _with(_adapted(), lambda m: m.lora_A["default"].register_forward_pre_hook(hook)),
        ),
        "replaced": ("already replaced, by", _with(nn.Linear(4, 4), lambda m: setattr(m, "forward", hook))),
        "accelerate": ("by accelerate", _with(nn.Linear(4, 4), lambda m: setattr(m, "_hf_hook", object()))),
        "parametrized": (
            "its weight is computed",
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        ),
        "Conv1D that trains": ("Conv1D whose weight trains", Conv1D(4, 4)),
        "integers": ("its weight is torch.int8", _with(nn.Linear(4, 4), _as_int8)),
        "ia3": (
            "is adapted by Linear, which is no LoRA",
            _adapted_by_ia3(),
        ),
    }


def _as_int8(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", _reasons())
def test_reasons(kind: str) -> None:
    expected, module = _reasons()[kind]
    reason = LiveLinear.of(module)
    assert isinstance(reason, str)
    assert expected in reason


def test_adapted_8bit_layers_keep_pefts_path() -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
    model.is_loaded_in_8bit = True  # type: ignore[assignment]
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), model)
    assert type(model[0]).__name__ == "Linear8bitLt"
    (finding,) = _patch(model)
    assert (finding.action, finding.subject, finding.capability) == ("skipped", "0", "lora")
    assert "8-bit" in finding.reason


def test_without_peft_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.split(".")[0] in ("peft", "bitsandbytes", "transformers"), sys.modules)]:
        monkeypatch.delitem(sys.modules, name)
    assert isinstance(LiveLinear.of(nn.Linear(4, 4)), LiveLinear)
    assert _patch(nn.Sequential(nn.Linear(4, 4))) == []
    assert not hasattr(linears, "peft")


def test_what_is_not_patched() -> None:
    model = _model(in_4bit=True)
    assert _patch(model, kernels=False) == []
    assert _patch(model, kernels=("rms_norm", "nf4")) == []
    assert [finding.reason for finding in _patch(model, kernels=("lora",))] == [
        "its weight is 4-bit, and the op nf4 is switched off"
    ] * 2
    (finding,) = _patch(model, taken=[model.linears[0]])
    assert finding == Finding(
        "changed", "linears.1", "lora op over a frozen 4-bit weight (nf4, double-quantised)", "lora"
    )
    (again,) = _patch(model, taken=[model.linears[0]])
    assert again.action == "skipped"
    assert "already replaced, by peft" in again.reason
    assert _patch(model, taken=[model]) == []


# A whole model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_as_with_peft(checkpointing: bool) -> None:
    """Dropout everywhere: the same masks in every layer, so the same loss and gradients but for float32's rounding."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    lora_config = LoraConfig(
        r=4, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    stock: Any = get_peft_model(LlamaForCausalLM(config), lora_config)
    if checkpointing:
        stock.enable_input_require_grads()
        stock.gradient_checkpointing_enable({"use_reentrant": False})
    ours: Any = copy.deepcopy(stock)
    findings = _patch(ours)
    assert [finding.action for finding in findings] == ["changed"] * 14
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    results = []
    for model in (stock.train(), ours.train()):
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in _trained(model)), torch.get_rng_state().double()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
