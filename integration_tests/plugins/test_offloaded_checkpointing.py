"""Offloaded checkpointing gives the numbers of the host's checkpointing to the bit, and holds nothing longer than it must.

On a CPU the ring is forced on with a stand-in device whose copies run as late as they may (``lazy_device``).
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import sloth_plugins.offloaded_checkpointing as plugin
import torch
from sloth_backend import SlothConfig, optimize, report, undo
from sloth_backend.findings import Edits
from sloth_backend.plan import MemoryPlan
from sloth_backend.run import Run
from sloth_plugins.offloaded_checkpointing.seam import FUNCTION, LayerCheckpoint, Rings, Seam, checkpointed_layers
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from integration_tests import tiny
from integration_tests.plugins.lazy_device import LazyDevice, make_rings, ring_of

LAYERS = 4
FLAVOURS = [{"use_reentrant": True}, {"use_reentrant": False}]
Gradients = dict[str, torch.Tensor]


def make_llama(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).train()


def make_lora(**overrides: Any) -> Any:
    model = make_llama(**overrides)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def batch(length: int = 12, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(model: Any, batches: list[dict[str, torch.Tensor]], **options: Any) -> tuple[list[float], Gradients]:
    """Losses, and the gradients accumulated over ``batches``."""
    torch.manual_seed(3)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward(**options)
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Forced:
    """The ring, switched on for a model on the CPU: all layers offload but the last ``keep``."""

    def __init__(self, model: Any, keep: int = 1, **options: Any) -> None:
        self.device = LazyDevice()
        self.edits = Edits()
        self.rings: Rings = make_rings(self.device, **options)
        layers = checkpointed_layers(base(model)).values()
        plan = {layer: "offload" if n < len(layers) - keep else "recompute" for n, layer in enumerate(layers)}
        Seam(base(model), plan, self.rings).install(self.edits)  # type: ignore[arg-type]

    def assert_idle(self) -> None:
        """Every copy saw live memory, and no layer input is held any more (without help from the garbage collector)."""
        assert not self.device.violations
        assert ring_of(self.rings).memory.bytes_used == 0


@contextmanager
def forced(model: Any, **options: Any) -> Iterator[Forced]:
    ring = Forced(model, **options)
    yield ring
    ring.assert_idle()
    ring.edits.rollback()


def assert_same(ours: tuple[list[float], Gradients], stock: tuple[list[float], Gradients]) -> None:
    assert ours[0] == stock[0]
    assert ours[1].keys() == stock[1].keys()
    assert ours[1]
    for name, gradient in stock[1].items():
        assert torch.equal(ours[1][name], gradient), name


@pytest.mark.parametrize("flavour", FLAVOURS, ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("make", [make_llama, make_lora], ids=["full", "lora"])
@pytest.mark.parametrize("enabled_first", [True, False])
def test_same_numbers_as_the_host(make: Any, flavour: dict[str, bool], enabled_first: bool) -> None:
    batches = [batch(12), batch(20, rows=3, seed=1), batch(7, seed=2)]
    stock, model = make(attention_dropout=0.1), make(attention_dropout=0.1)
    stock.gradient_checkpointing_enable(flavour)
    if enabled_first:
        model.gradient_checkpointing_enable(flavour)
    with forced(model) as ring:
        if not enabled_first:
            model.gradient_checkpointing_enable(flavour)
        assert_same(train(model, batches), train(stock, batches))
    # With a frozen base the embeddings' output is a leaf, which the graph holds on the device anyway.
    leaves = len(batches) if make is make_lora else 0
    assert ring.device.copies == {
        "outward": (LAYERS - 1) * len(batches) - leaves,
        "homeward": (LAYERS - 1) * len(batches) - leaves,
    }


@pytest.mark.parametrize("flavour", FLAVOURS, ids=["reentrant", "non_reentrant"])
def test_the_device_holds_two_inputs_at_most(flavour: dict[str, bool]) -> None:
    model = make_llama(num_hidden_layers=8)
    inputs: list[StorageWeakRef] = []

    def note(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        inputs.append(StorageWeakRef(args[0].untyped_storage()))
        held.append(sum(not reference.expired() for reference in inputs))

    held: list[int] = []
    hooks = [layer.register_forward_hook(note) for layer in checkpointed_layers(model).values()]
    model.gradient_checkpointing_enable(flavour)
    with forced(model):
        loss = model(**batch()).loss
        assert max(held) <= 2
        assert sum(not reference.expired() for reference in inputs) == 1
        del loss
    for hook in hooks:
        hook.remove()


def test_every_layer_may_be_offloaded() -> None:
    stock, model = make_llama(), make_llama()
    stock.gradient_checkpointing_enable()
    with forced(model, keep=0):
        model.gradient_checkpointing_enable()
        assert_same(train(model, [batch()]), train(stock, [batch()]))


def test_every_nth_layer() -> None:
    stock, model = make_llama(num_hidden_layers=6), make_llama(num_hidden_layers=6)
    stock.gradient_checkpointing_enable(every_n_layers=2)
    with forced(model) as ring:
        model.gradient_checkpointing_enable(every_n_layers=2)
        assert_same(train(model, [batch()]), train(stock, [batch()]))
        wrapped = [FUNCTION in vars(m) and isinstance(vars(m)[FUNCTION], LayerCheckpoint) for m in model.model.layers]
        assert wrapped == [True, False] * 3
    assert ring.device.copies["outward"] == 3


@pytest.mark.parametrize("flavour", FLAVOURS, ids=["reentrant", "non_reentrant"])
def test_backward_twice_and_two_graphs_at_once(flavour: dict[str, bool]) -> None:
    def work(model: Any) -> tuple[list[float], Gradients]:
        first = model(**batch()).loss
        first.backward(retain_graph=True)
        first.backward()
        second, third = model(**batch(seed=1)).loss, model(**batch(9, seed=2)).loss
        (second - 2 * third).backward()
        return train(model, [batch(seed=4)])

    stock, model = make_llama(), make_llama()
    stock.gradient_checkpointing_enable(flavour)
    model.gradient_checkpointing_enable(flavour)
    with forced(model):
        assert_same(work(model), work(stock))


def test_autocast_and_checkpoint_options_survive() -> None:
    options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none", "debug": False}
    stock, model = make_llama(), make_llama()
    stock.gradient_checkpointing_enable(options)
    with forced(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model.gradient_checkpointing_enable(options)
        assert vars(model.model.layers[0])[FUNCTION].host.keywords == options
        assert_same(train(model, [batch()]), train(stock, [batch()]))


@pytest.mark.parametrize("flavour", FLAVOURS, ids=["reentrant", "non_reentrant"])
def test_a_forward_that_fails_or_has_no_backward_leaks_nothing(flavour: dict[str, bool]) -> None:
    model = make_llama()
    model.gradient_checkpointing_enable(flavour)
    with forced(model) as ring:
        hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch())
        hook.remove()
        ring.assert_idle()
        loss = model(**batch()).loss
        assert ring_of(ring.rings).memory.bytes_used > 0
        del loss
        ring.assert_idle()
        held = ring_of(ring.rings).memory.bytes_held
        train(model, [batch(), batch(5)])
        assert ring_of(ring.rings).memory.bytes_held == held


def test_evaluation_copies_nothing() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    with forced(model) as ring:
        with torch.no_grad():
            model(**batch())
        model.eval()(**batch())
        assert ring.device.copies["outward"] == 0


def change(tensor: torch.Tensor) -> None:
    """Modify a tensor in place behind autograd's back."""
    tensor.detach().mul_(1.5)


def test_an_input_modified_in_place_is_noticed() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for victim in (1, 3):
        with forced(model):
            layer = model.model.layers[victim]
            hook = layer.register_forward_hook(lambda _, args, __: change(args[0]))
            loss = model(**batch()).loss
            hook.remove()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            del loss


def test_an_input_modified_by_its_reentrant_layer_is_the_hosts_matter() -> None:
    def work(model: Any) -> tuple[list[float], Gradients]:
        hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: change(args[0]))
        result = train(model, [batch()])
        hook.remove()
        return result

    stock, model = make_llama(), make_llama()
    stock.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with forced(model):
        assert_same(work(model), work(stock))


@pytest.mark.parametrize("flavour", FLAVOURS, ids=["reentrant", "non_reentrant"])
def test_an_input_shared_by_layers_stays_on_the_device(flavour: dict[str, bool]) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 61}
        layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForConditionalGeneration(BartConfig(**sizes, **layers, max_position_embeddings=64)).train()

    stock, model = make(), make()
    stock.gradient_checkpointing_enable(flavour)
    model.gradient_checkpointing_enable(flavour)
    with forced(model) as ring:
        assert_same(train(model, [batch(), batch(9)]), train(stock, [batch(), batch(9)]))
    assert ring.device.copies["homeward"] <= 2 * 5


def test_sliced_inputs_stay_and_transposed_ones_keep_their_strides() -> None:
    def work(model: Any, reshape: Any) -> tuple[list[float], Gradients]:
        strides: set[tuple[int, ...]] = set()

        def change(_: Any, args: Any, kwargs: Any) -> Any:
            return (reshape(args[0]),), kwargs

        def note(_: Any, args: Any) -> None:
            strides.add(args[0].stride())

        hooks = [model.model.layers[0].register_forward_hook(lambda _, __, output: reshape(output))]
        hooks += [model.model.layers[1].register_forward_pre_hook(note)]
        result = train(model, [batch()])
        for hook in hooks:
            hook.remove()
        assert len(strides) == 1
        return result

    for reshape in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: torch.cat([x, x], -1)[..., :32]):
        stock, model = make_llama(), make_llama()
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with forced(model):
            assert_same(work(model, reshape), work(stock, reshape))


def test_small_inputs_stay() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    with forced(model, min_bytes=2 * 12 * 32 * 4 + 1) as ring:
        train(model, [batch()])
        assert ring.device.copies["outward"] == 0
        train(model, [batch(13)])
        assert ring.device.copies["outward"] == LAYERS - 1


def test_without_host_memory_inputs_stay_on_the_device() -> None:
    stock, model = make_llama(), make_llama()
    stock.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()
    with forced(model, available=lambda: 0) as ring, pytest.warns(RuntimeWarning, match="no memory left"):
        assert_same(train(model, [batch()]), train(stock, [batch()]))
    assert ring.device.copies == {"outward": 0, "homeward": 0}


def describe(model: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of every module; hooks by their number alone, since torch counts them through the process."""
    found = tiny.describe(model)
    return {
        name: {key: len(value) if "_hooks" in key and value is not None else value for key, value in facts.items()}
        for name, facts in found.items()
    }


def test_undo_restores_every_attribute_and_the_memory() -> None:
    for early, late in ((True, False), (False, True), (True, True)):
        model, twin = make_llama(), make_llama()
        for each in (model, twin):
            each.gradient_checkpointing_enable({"use_reentrant": True}) if early else None
        assert describe(model) == describe(twin)
        ring = Forced(model)
        if late:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch()).loss
        assert plugin.host_bytes(model) == sum(ring.device.pinned.values()) > 0
        ring.edits.rollback()
        assert describe(model) == describe(twin)
        functions = {name: vars(m).get(FUNCTION) for name, m in model.named_modules()}
        assert not any(isinstance(function, LayerCheckpoint) for function in functions.values())
        assert functions["model.layers.0"] is functions["model"]
        loss.backward()
        device = ring.device
        del loss, ring
        assert not device.pinned
        assert not device.violations


def test_disabling_checkpointing_leaves_the_hosts_function() -> None:
    model = make_llama()
    with forced(model) as ring:
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()
        assert not any(isinstance(vars(m)[FUNCTION], LayerCheckpoint) for m in model.model.layers)
        train(model, [batch()])
    assert ring.device.copies["outward"] == 0


def test_a_copied_or_pickled_model_is_a_stock_model() -> None:
    model = make_llama()
    ring = Forced(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    function = vars(model.model.layers[0])[FUNCTION]
    assert pickle.loads(pickle.dumps(function)).keywords == function.host.keywords == {"use_reentrant": False}
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": True})
    assert vars(other.model.layers[0])[FUNCTION].keywords == {"use_reentrant": True}
    train(other, [batch()])
    assert ring.device.copies["outward"] == 0
    device = ring.device
    del model, function, ring
    gc.collect()
    assert not device.pinned


def make_run(device: str = "cuda", gradient_checkpointing: bool | None = True, **options: Any) -> Run:
    return Run("user", SlothConfig(**options), torch.device(device), gradient_checkpointing=gradient_checkpointing)


def test_plan() -> None:
    model = make_llama()
    offload, recompute = ("offload",) * 3, ("recompute",)
    assert plugin.sloth_memory_plan(model, make_run()) == MemoryPlan(offload + recompute)
    assert plugin.sloth_memory_plan(model, make_run(offload_keep_last=9)) == MemoryPlan(recompute * 4)
    assert plugin.sloth_memory_plan(model, make_run("cpu")) is None
    assert plugin.sloth_memory_plan(model, make_run(checkpointing="host")) is None
    assert plugin.sloth_memory_plan(torch.nn.Linear(2, 2), make_run()) is None


@pytest.mark.parametrize(
    ("run", "plan", "reason"),
    [
        (make_run("cpu"), None, "the model is on cpu"),
        (make_run(checkpointing="host"), None, "checkpointing='host'"),
        (make_run(gradient_checkpointing=False), None, "the host does not checkpoint"),
        (make_run(), None, "no memory plan"),
        (make_run(), MemoryPlan(("offload",) * 3), "has 3 layers, the model 4"),
        (make_run(), MemoryPlan(("recompute",) * 4), "offloads no layer: 4 recompute"),
    ],
)
def test_steps_aside_with_one_finding(run: Run, plan: MemoryPlan | None, reason: str) -> None:
    model, twin = make_llama(), make_llama()
    (finding,) = plugin.sloth_patch_model(model, run, plan, Edits())
    assert (finding.action, finding.capability) == ("skipped", "offloaded_checkpointing")
    assert reason in finding.reason
    assert tiny.describe(model) == tiny.describe(twin)


def test_steps_aside_for_models_that_do_not_checkpoint() -> None:
    class Old(torch.nn.Module):
        pass

    (finding,) = plugin.sloth_patch_model(Old(), make_run(), MemoryPlan(()), Edits())
    assert "no layer of this model checkpoints" in finding.reason


def test_optimize_on_a_cpu_says_why_it_does_nothing() -> None:
    model = make_llama()
    model.gradient_checkpointing_enable()
    optimize(model, config=SlothConfig(kernels=False, print_report=False))
    (finding,) = report(model).of(capability="offloaded_checkpointing")
    assert (finding.action, finding.plugin) == ("skipped", "offloaded_checkpointing")
    assert "the model is on cpu" in finding.reason
    undo(model)


@pytest.mark.parametrize("refuses", [False, True])
def test_findings_where_it_takes_effect(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    device = LazyDevice(refuses_to_pin=refuses)
    monkeypatch.setattr(plugin, "CudaDevice", lambda _: device)
    model, run, edits = make_llama(), make_run(), Edits()
    findings = plugin.sloth_patch_model(model, run, plugin.sloth_memory_plan(model, run), edits)
    assert [f.subject for f in findings if f.action == "changed"] == [f"model.layers.{n}" for n in range(3)]
    assert [f.subject for f in findings if f.action == "skipped"] == ["model.layers.3"]
    assert [f.subject for f in findings if f.action == "warned"] == ["host memory"] * refuses
    assert not device.pinned
    edits.rollback()
    assert "_set_gradient_checkpointing" not in vars(model)
