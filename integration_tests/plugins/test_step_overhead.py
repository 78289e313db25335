"""Step overhead: the same modes and counts as torch's and transformers' own walks, whatever happens to the model."""

from __future__ import annotations

import copy
import gc
import types
import weakref
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


def trainer_of(model: Any, n_gpu: int = 1) -> Any:
    return types.SimpleNamespace(model=model, args=types.SimpleNamespace(n_gpu=n_gpu))


def trained(model: Any) -> Any:
    """``model`` as a trainer's, adapters and all."""
    (finding,) = step_overhead.sloth_patch_trainer(trainer_of(patched(model)), Edits())
    assert finding.action == "changed", finding
    assert "parameters" in vars(model)
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
    layers: Any = model[1]
    layers.append(own := Own())
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


def places(mine: Any, stock: Any) -> tuple[list[str], list[str]]:
    """The names of what both models' ``parameters`` give, in their order, by nn.Module's own walk."""
    found = []
    for model in (mine, stock):
        names = {id(p): name for name, p in nn.Module.named_parameters(model)}
        found.append([names[id(p)] for p in model.parameters()])
    return found[0], found[1]


def tie(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def tie_layers(model: Any) -> None:
    first, last = layers_of(model)[0].mlp.up_proj, layers_of(model)[1].mlp.up_proj
    last.weight = first.weight


def reorder(table: dict[str, Any], name: str) -> None:
    table[name] = table.pop(name)


PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "tied": tie,
    "untied": untie,
    "tied across layers": tie_layers,
    "a bias more": lambda model: setattr(layers_of(model)[0].mlp.up_proj, "bias", nn.Parameter(torch.ones(64))),
    "one of a module that had none": lambda model: layers_of(model)[0].mlp.act_fn.register_parameter(
        "scale", nn.Parameter(torch.ones(1))
    ),
    "another weight": lambda model: setattr(
        layers_of(model)[1].mlp.up_proj, "weight", nn.Parameter(torch.ones(64, 32))
    ),
    "no weight": lambda model: delattr(layers_of(model)[1].mlp.up_proj, "weight"),
    "another order": lambda model: reorder(layers_of(model)[0]._modules, "self_attn"),
    "all frozen": lambda model: model.requires_grad_(False),
    "the first one gone": lambda model: delattr(model.get_input_embeddings(), "weight"),
}


@pytest.mark.parametrize("change", CHANGES | RENAMED | PARAMETERS)
@pytest.mark.parametrize("make", [make_llama, make_lora])
def test_a_trainers_parameters_are_those_of_the_walk(make: Callable[[], Any], change: str) -> None:
    stock, mine = make(), trained(make())
    ours, theirs = places(mine, stock)
    assert ours == theirs
    for model in (stock, mine):
        (CHANGES | RENAMED | PARAMETERS)[change](model)
    ours, theirs = places(mine, stock)
    assert ours == theirs
    assert [id(p) for p in mine.parameters()] == [id(p) for p in nn.Module.parameters(mine)]
    assert list(map(id, mine.parameters(recurse=False))) == list(map(id, nn.Module.parameters(mine, recurse=False)))
    assert isinstance(mine.parameters(), types.GeneratorType)
    assert mine.num_parameters() == stock.num_parameters()


@pytest.mark.parametrize("change", ["nothing", "tied", "another weight", "a shared module", "an adapter", "all frozen"])
def test_gradients_are_clipped_and_dropped_as_by_the_walk(change: str) -> None:
    stock, mine = make_lora(), trained(make_lora())
    norms = []
    for model in (stock, mine):
        torch.manual_seed(0)
        (CHANGES | PARAMETERS)[change](model)
        for p in nn.Module.parameters(model):
            p.grad = torch.randn_like(p) if p.requires_grad else None
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert torch.equal(*norms)
    for p, q in zip(nn.Module.parameters(stock), nn.Module.parameters(mine), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad))
    mine.zero_grad()
    assert all(p.grad is None for p in nn.Module.parameters(mine))


def test_a_trainers_parameters_are_read_without_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(make_lora())
    count = len(list(nn.Module.parameters(model)))
    calls: list[nn.Module] = []
    original = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1]
    )
    assert len(list(model.parameters())) == count
    assert len(calls) < 12 < count


def test_the_first_of_a_trainers_parameters_needs_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(make_lora())
    monkeypatch.setattr(step_overhead.Parts, "stand", lambda self: pytest.fail("looked at all modules"))
    assert next(model.parameters()) is model.get_input_embeddings().weight


def test_a_dropped_parameter_is_not_kept_alive() -> None:
    model = trained(make_lora())
    module = layers_of(model)[0].mlp.up_proj
    weight = weakref.ref(module.weight)
    assert any(p is weight() for p in model.parameters())
    module.weight = None
    gc.collect()
    assert weight() is None


def test_modules_that_list_in_their_own_way_are_asked() -> None:
    model = trained(make_llama())
    layers_of(model)[0].mlp.add_module("hidden", hidden := Hidden())
    hidden.weight = nn.Parameter(torch.ones(1))
    assert hidden.weight not in set(model.parameters())
    (finding,) = step_overhead.sloth_patch_trainer(trainer_of(twin := make_llama()), Edits())
    assert finding.action == "changed"
    twin.model.add_module("hidden", Hidden())
    (finding,) = step_overhead.sloth_patch_trainer(trainer_of(twin), Edits())
    assert (finding.action, finding.reason) == ("skipped", "Hidden list modules in their own way")


class OwnParameters(nn.Sequential):
    """Gives no parameters."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter(())


def test_models_that_cannot_be_listed_are_left_alone() -> None:
    layers = [nn.Linear(1, 1) for _ in range(20)]
    cases = [
        (trainer_of(OwnParameters(*layers)), "OwnParameters finds parameters in its own way"),
        (trainer_of(nn.Sequential(*layers[:2])), "fewer than 16 modules"),
        (trainer_of(nn.Sequential(*layers), n_gpu=2), "nn.DataParallel"),
    ]
    for trainer, reason in cases:
        (finding,) = step_overhead.sloth_patch_trainer(trainer, Edits())
        assert finding.action == "skipped"
        assert reason in finding.reason
        assert "parameters" not in vars(trainer.model)


class Alike(nn.Linear):
    """Equal to every other one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    __hash__ = nn.Module.__hash__


def test_modules_that_are_equal_do_not_pass_for_each_other() -> None:
    model = trained(nn.Sequential(*(nn.ModuleList([Alike(1, 1)]) for _ in range(20))))
    model[3][0] = fresh = Alike(1, 1)
    assert any(p is fresh.weight for p in model.parameters())
    model[3][0].eval()
    assert all(modes(model.train()).values())


def test_names_of_one_module_that_change_places_are_noticed() -> None:
    stock, mine = make_llama(), trained(make_llama())
    for model in (stock, mine):
        layers_of(model).append(layers_of(model)[1])
    assert walks(mine) == walks(stock)
    for model in (stock, mine):
        reorder(layers_of(model)._modules, "1")
    assert list(layers_of(mine)._modules) == ["0", "2", "1"]
    assert walks(mine) == walks(stock)


def test_a_copy_of_a_trainers_model_has_its_own_parameters() -> None:
    model = trained(make_lora())
    other = copy.deepcopy(model)
    assert {id(p) for p in model.parameters()}.isdisjoint(map(id, other.parameters()))
    assert list(map(id, other.parameters())) == list(map(id, nn.Module.parameters(other)))
    layers_of(other)[0].mlp = None
    assert list(map(id, other.parameters())) == list(map(id, nn.Module.parameters(other)))


def test_undo_gives_a_trainers_model_its_parameters_back() -> None:
    model, edits = make_lora(), Edits()
    step_overhead.sloth_patch_trainer(trainer_of(model), edits)
    edits.rollback()
    assert "parameters" not in vars(model)
    assert tiny.describe(model) == tiny.describe(make_lora())
