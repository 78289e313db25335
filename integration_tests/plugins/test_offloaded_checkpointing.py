"""Offloaded checkpointing gives the host's numbers to the bit and holds nothing longer than it must.

On a CPU the ring is forced on with a stand-in device whose copies run as late as they may (``lazy_device``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments

from integration_tests.plugins.lazy_device import ring_of
from integration_tests.plugins.offloading import (
    FLAVOURS,
    LAYERS,
    Gradients,
    assert_same,
    batch,
    forced,
    make_llama,
    make_lora,
    train,
)
from integration_tests.sameness.architectures import SPECIALS, make_model
from sloth_plugins.offloaded_checkpointing.seam import FUNCTION, LayerCheckpoint, checkpointed_layers


@pytest.mark.parametrize("flavour", FLAVOURS)
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


@pytest.mark.parametrize("name", SPECIALS)
def test_any_architecture(name: str) -> None:
    stock, model = make_model(name).train(), make_model(name).train()
    stock.gradient_checkpointing_enable()
    with forced(model) as ring:
        model.gradient_checkpointing_enable()
        assert_same(train(model, [batch()]), train(stock, [batch()]))
    assert ring.device.copies["homeward"] == len(checkpointed_layers(model)) - 1


def test_the_trainer_may_enable_it_later(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    rows = [{name: value[0] for name, value in batch(9, seed=seed).items()} for seed in range(4)]
    stock, model = make_llama(), make_llama()
    with forced(model) as ring:
        for each in (stock, model):
            Trainer(each, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert ring.device.copies["outward"] == (LAYERS - 1) * 4
    assert all(map(torch.equal, model.parameters(), stock.parameters()))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_under_ddp(flavour: dict[str, bool]) -> None:
    stock, model = make_llama(), make_llama()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        stock.gradient_checkpointing_enable(flavour)
        with forced(model):
            model.gradient_checkpointing_enable(flavour)
            runs = [train(DistributedDataParallel(each), [batch(), batch(8)]) for each in (model, stock)]
            assert_same(*runs)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flavour", FLAVOURS)
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


@pytest.mark.parametrize("flavour", FLAVOURS)
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


@pytest.mark.parametrize("flavour", FLAVOURS)
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


@pytest.mark.parametrize("flavour", FLAVOURS)
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

    for reshape in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., :32],
    ):
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
