"""Step overhead: the same modes and counts as torch's and transformers' own walks, whatever happens to the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import sloth_backend
from integration_tests import tiny
from sloth_backend.findings import Edits
from sloth_plugins import step_overhead

ARGUMENTS = [{"exclude_embeddings": e, "only_trainable": t} for e in (False, True) for t in (False, True)]


def make_llama() -> Any:
    return tiny.make_model(tiny.make_tokenizer(), tie_word_embeddings=False)


def make_lora(**options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1, **options})
    return peft.get_peft_model(make_llama(), config)


def patched(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    step_overhead.sloth_patch_model(base, Edits())
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def walks(model: nn.Module) -> list[list[tuple[str, Any]]]:
    """What every method gives that finds modules, parameters or buffers, by names and, across twins, by place."""
    places: dict[int, int] = {}

    def told(found: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return [(name, places.setdefault(id(item), len(places))) for name, item in found]

    return [
        told(walk)
        for walk in (
            nn.Module.named_modules(model),
            model.named_modules(),
            model.named_modules(prefix="a.b"),
            model.named_modules(remove_duplicate=False),
            layers_of(model).named_modules(),
            layers_of(model)[0].named_modules(),
            (("", module) for module in model.modules()),
            model.named_parameters(),
            model.named_parameters(remove_duplicate=False),
            (("", parameter) for parameter in model.parameters()),
            model.named_buffers(),
        )
    ]


def layers_of(model: Any) -> Any:
    return model.get_decoder().layers


def exchange_a_layer(model: Any) -> None:
    layers_of(model)[1] = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "a module in evaluation": lambda model: layers_of(model)[0].self_attn.eval(),
    "all in evaluation": lambda model: model.eval(),
    "an outer flag alone": lambda model: setattr(layers_of(model), "training", False),
    "an adapter": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"]), model),
    "another layer": exchange_a_layer,
    "a layer less": lambda model: layers_of(model).pop(0),
    "a child of a leaf": lambda model: layers_of(model)[0].mlp.up_proj.add_module("extra", nn.Dropout()),
    "a shared module": lambda model: layers_of(model).append(layers_of(model)[0]),
    "new embeddings": lambda model: model.resize_token_embeddings(401),
    "a weight less": lambda model: setattr(layers_of(model)[0].mlp.up_proj, "weight", None),
    "a smaller weight": lambda model: setattr(layers_of(model)[0].mlp.up_proj.weight, "data", torch.ones(2, 2)),
    "a weight frozen": lambda model: layers_of(model)[0].mlp.up_proj.weight.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [make_llama, make_lora])
def test_modes_and_counts_are_those_of_the_walk(make: Callable[[], Any], change: str) -> None:
    stock, mine = make(), patched(make())
    for mode in (True, False):
        for model in (stock, mine):
            model.train(not mode)
            model.num_parameters(exclude_embeddings=True)
        for model in (stock, mine):
            CHANGES[change](model)
            assert model.train(mode) is model
        assert modes(mine) == modes(stock)
        for arguments in ARGUMENTS:
            assert mine.num_parameters(**arguments) == stock.num_parameters(**arguments)


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


RENAMED: dict[str, Callable[[Any], Any]] = {
    "a last child renamed": lambda model: rename(layers_of(model)._modules, "1", "last"),
    "a child that moved": lambda model: layers_of(model)[0].add_module("own", layers_of(model)._modules.pop("1")),
    "no child": lambda model: setattr(layers_of(model)[0], "mlp", None),
}


@pytest.mark.parametrize("change", CHANGES | RENAMED)
@pytest.mark.parametrize("make", [make_llama, make_lora])
def test_modules_and_parameters_are_those_of_the_walk(make: Callable[[], Any], change: str) -> None:
    stock, mine = make(), patched(make())
    assert walks(mine) == walks(stock)
    for model in (stock, mine):
        (CHANGES | RENAMED)[change](model)
    assert walks(mine) == walks(stock)
    mine.zero_grad()


def test_a_memo_is_read_and_filled_as_by_the_walk() -> None:
    model = patched(make_lora())
    layers = layers_of(model)
    cases: list[list[nn.Module]] = [[], [layers], [layers[0]], [layers[1].mlp.act_fn], [nn.Linear(1, 1)]]
    for known in cases:
        mine, stock = set(known), set(known)
        found = list(layers.named_modules(mine, "x"))
        assert found == list(nn.Module.named_modules(layers, stock, "x"))
        assert mine == stock
    assert list(layers.named_modules(set(layers.modules()))) == []


def test_few_modules_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(make_lora())
    calls: list[nn.Module] = []
    original = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1]
    )
    count = len(list(model.parameters()))
    assert len(calls) < 12 < count


class Hidden(nn.Module):
    """Says that it is not there."""

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        return iter(())


def test_lists_whose_class_overrides_named_modules_are_walked() -> None:
    model: Any = nn.ModuleList(nn.ModuleList([nn.Dropout() for _ in range(20)]) for _ in range(2))
    model[1].append(hidden := Hidden())
    found = step_overhead.sloth_patch_model(model, Edits())
    assert [f.subject for f in found if f.reason.startswith("named_modules")] == ["0"]
    model[0].append(hidden)
    assert hidden not in set(model.modules())
    assert len(list(model.modules())) == 43
    assert step_overhead.sloth_patch_model(nn.ModuleList([nn.ModuleList([hidden])]), Edits())[0].action == "skipped"


def test_the_first_parameter_needs_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(make_lora())
    monkeypatch.setattr(step_overhead.Parts, "stand", lambda self: pytest.fail("looked at all layers"))
    assert next(model.parameters()) is model.get_input_embeddings().weight


def test_few_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(make_lora())
    model.train()
    calls: list[nn.Module] = []
    original = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: (calls.append(self), original(self, mode))[1])
    model.train()
    assert len(calls) < 10 < len(list(model.modules()))


def test_parameters_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lora()
    calls: list[nn.Module] = []
    original = nn.Module.named_parameters
    patched(model)
    monkeypatch.setattr(nn.Module, "named_parameters", lambda self, *a, **k: (calls.append(self), original(self))[1])
    counts = {model.num_parameters(exclude_embeddings=True) for _ in range(3)}
    assert (len(calls), len(counts)) == (1, 1)


class Own(nn.Module):
    """Says what ``train`` it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def train(self, mode: bool = True) -> Own:
        self.seen.append(mode)
        return super().train(mode)


def test_parts_whose_class_overrides_train_are_walked() -> None:
    model = nn.Sequential(*(nn.ModuleList([nn.Dropout() for _ in range(20)]) for _ in range(3)))
    model[1].append(own := Own())
    findings = step_overhead.sloth_patch_model(model, Edits())
    assert [f.subject for f in findings if f.reason.startswith("train()")] == ["0", "2"]
    model.eval().train()
    assert own.seen == [False, True]
    assert all(modes(model).values())


def test_a_module_that_overrides_train_and_comes_later_is_called() -> None:
    model = patched(make_llama())
    layers_of(model)[0].mlp.add_module("own", own := Own())
    model.train(False)
    model.train(True)
    assert own.seen == [False, True]
    layers_of(model)[0].mlp._modules.pop("own")
    model.eval()
    assert not any(modes(model).values())
    assert own.seen == [False, True]


def test_a_mode_that_is_no_boolean_is_refused_as_torch_does() -> None:
    model = patched(make_llama())
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        layers_of(model).train(1)


def test_small_models_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    (finding,) = step_overhead.sloth_patch_model(model, Edits())
    assert (finding.action, finding.subject) == ("skipped", "train")
    assert "train" not in vars(model)


def test_a_copy_looks_after_itself() -> None:
    model = patched(make_llama())
    other = copy.deepcopy(model.eval())
    other.train()
    assert all(modes(other).values())
    assert not any(modes(model).values())
    assert {id(module) for module in model.modules()}.isdisjoint(map(id, other.modules()))
    count = model.num_parameters()
    other.lm_head = nn.Identity()
    assert other.num_parameters() < count == model.num_parameters()


def test_undo_restores_every_attribute() -> None:
    model, twin = make_llama(), make_llama()
    sloth_backend.optimize(model, config={"print_report": False})
    found = sloth_backend.report(model).of(capability="step_overhead")
    assert [(f.action, f.subject, f.plugin) for f in found] == [
        ("changed", "model.layers", "step_overhead"),
        ("changed", "model.layers", "step_overhead"),
        ("changed", "num_parameters", "step_overhead"),
    ]
    sloth_backend.undo(model)
    assert tiny.describe(model) == tiny.describe(twin)
