"""One launch a step: everything that goes through an optimizer's ``step`` works as with bitsandbytes' own.

Where Triton's interpreter runs (``TRITON_INTERPRET=1``) the kernels do the arithmetic, elsewhere their reference does.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.optim import GlobalOptimManager
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from sloth_backend.findings import Edits
from sloth_kernels import launch
from sloth_kernels.optimizers import adam, batch
from sloth_plugins import optimizer_step

SIZES = [(8, 600), (3,), (257,), (4096,)]
"""The first and the last have 8-bit states, the others 32-bit ones."""
OPTIONS = {"lr": 1e-2, "betas": (0.875, 0.984375), "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.interpreting():
        return

    def by_reference(self: batch.Batch, grads: Sequence[torch.Tensor], hyper: adam.Hyper) -> None:
        for p, grad, state in zip(self.params, grads, self.states, strict=True):
            assert p.grad is grad
            adam.reference(p, grad, state, hyper)

    monkeypatch.setattr(optimizer_step, "interpreting", lambda: True)
    monkeypatch.setattr(batch, "runs_triton", lambda *tensors: True)
    monkeypatch.setattr(batch.Batch, "_launch", by_reference)


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps overrides for the whole process, by the identity of parameters that may be gone."""
    manager = GlobalOptimManager.get_instance()
    for name in ("pid2config", "index2config"):
        monkeypatch.setattr(manager, name, {})
    monkeypatch.setattr(manager, "module_weight_config_triple", [])


class Launches:
    """Counts launches, and bitsandbytes' own updates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.theirs = 0
        launch_batch, update_step = batch.Batch._launch, bnb.optim.AdamW8bit.update_step

        def counted(*args: Any) -> None:
            self.count += 1
            launch_batch(*args)

        def counted_theirs(*args: Any) -> None:
            self.theirs += 1
            update_step(*args)

        monkeypatch.setattr(batch.Batch, "_launch", counted)
        monkeypatch.setattr(bnb.optim.optimizer.Optimizer2State, "update_step", counted_theirs)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def make_params(sizes: Sequence[tuple[int, ...]] = SIZES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def make(params: Any = None, attached: bool = True, **options: Any) -> Any:
    optimizer = bnb.optim.AdamW8bit(make_params() if params is None else params, **{**OPTIONS, **options})
    if attached:
        (finding,) = optimizer_step.attach(optimizer, Edits())
        assert finding.action == "changed", finding
    return optimizer


def params_of(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def backward(optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=generator)


def train(optimizer: Any, steps: Sequence[int]) -> None:
    for seed in steps:
        backward(optimizer, seed)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit: parameters, and every state by its name."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(p, q)
        a, b = ours.state[p], theirs.state[q]
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


def test_two_launches_for_two_kinds_of_state(launches: Launches) -> None:
    optimizer = make()
    train(optimizer, range(3))
    assert (launches.count, launches.theirs) == (6, 0)
    assert [optimizer.state[p]["state1"].dtype for p in params_of(optimizer)] == [
        torch.uint8,
        torch.float32,
        torch.float32,
        torch.uint8,
    ]


def test_close_to_bitsandbytes_on_the_cpu() -> None:
    """There bitsandbytes rounds otherwise, and looks up entries near zero but roughly."""
    ours, theirs = make(weight_decay=0.0), make(attached=False, weight_decay=0.0)
    train(ours, range(3))
    train(theirs, range(3))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert (p - q).abs().mean() < 1e-4
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert ours.state[p]["step"] == theirs.state[q]["step"] == 3


def test_saved_states_go_on_in_either_optimizer() -> None:
    straight = make()
    train(straight, range(4))
    first = make()
    train(first, range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    plain = make([p.detach().clone().requires_grad_() for p in params_of(first)], attached=False)
    plain.load_state_dict(saved)
    resumed = make([p.detach().clone().requires_grad_() for p in params_of(plain)])
    resumed.load_state_dict(plain.state_dict())
    train(resumed, (2, 3))
    assert_same(resumed, straight)
    train(plain, (2,))


def test_load_between_steps() -> None:
    optimizer, straight = make(), make()
    train(optimizer, range(2))
    train(straight, range(2))
    kept, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params_of(optimizer)]
    train(optimizer, (7, 8))
    optimizer.load_state_dict(kept)
    for p, value in zip(params_of(optimizer), values, strict=True):
        p.data.copy_(value)
    train(optimizer, (2,))
    train(straight, (2,))
    assert_same(optimizer, straight)


def test_parameters_and_states_that_move() -> None:
    optimizer, straight = make(), make()
    train(straight, range(3))
    for step in range(3):
        train(optimizer, (step,))
        for p in params_of(optimizer):
            p.data = p.data.clone()
            optimizer.state[p]["state1"] = optimizer.state[p]["state1"].clone()
            optimizer.state[p]["state2"].data = optimizer.state[p]["state2"].clone()
    assert_same(optimizer, straight)


def test_gradients_come_and_go(launches: Launches) -> None:
    optimizer, alone = make(), make(make_params()[:1])
    late = params_of(optimizer)[3]
    for step in range(2):
        backward(optimizer, step)
        late.grad = None
        before = late.detach().clone()
        optimizer.step()
        assert torch.equal(late, before)
        assert not optimizer.state.get(late)
    assert launches.count == 4
    train(optimizer, (2,))
    assert launches.count == 7  # one more: steps are counted for each tensor
    assert [optimizer.state[p]["step"] for p in params_of(optimizer)] == [3, 3, 3, 1]
    train(alone, range(3))
    assert torch.equal(params_of(alone)[0], params_of(optimizer)[0])


def test_gradients_that_are_not_contiguous() -> None:
    optimizer, straight = make(), make()
    for step in range(2):
        backward(optimizer, step)
        for p in params_of(optimizer):
            assert p.grad is not None
            if p.dim() == 2:
                p.grad = p.grad.T.contiguous().T
        optimizer.step()
    train(straight, range(2))
    assert_same(optimizer, straight)


def test_groups_with_options_of_their_own_and_added_later() -> None:
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 1e-1, "weight_decay": 0.0}]
    optimizer = make(groups)
    train(optimizer, (0,))
    optimizer.add_param_group({"params": params[3:], "eps": 1e-4})
    train(optimizer, (1,))
    for i, (group, steps) in enumerate(zip(optimizer.param_groups, (2, 2, 1), strict=True)):
        assert all(optimizer.state[p]["step"] == steps for p in group["params"]), i
    assert (params[2] - make_params()[2]).abs().mean() > 5 * (params[1] - make_params()[1]).abs().mean()


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedules(scheduler_first: bool) -> None:
    optimizer, straight = make(attached=False), make()
    edits = Edits()
    if scheduler_first:
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        optimizer_step.attach(optimizer, edits)
    else:
        optimizer_step.attach(optimizer, edits)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(3):
            train(optimizer, (step,))
            scheduler.step()
            straight.param_groups[0]["lr"] = OPTIONS["lr"] / (1 + step)
            train(straight, (step,))
        edits.rollback()
        backward(optimizer, 3)
        optimizer.step()
        scheduler.step()
    assert_schedule_applied(optimizer, straight)


def assert_schedule_applied(optimizer: Any, straight: Any) -> None:
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 4
    train(straight, (3,))
    assert (params_of(optimizer)[0] - params_of(straight)[0]).abs().mean() < 1e-2


def test_closure_and_hooks() -> None:
    optimizer = make()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("everywhere"))
    try:

        def closure() -> float:
            assert torch.is_grad_enabled()
            backward(optimizer, 0)
            return 1.5

        with torch.profiler.profile() as profile:
            assert optimizer.step(closure) == 1.5
    finally:
        handle.remove()
    assert seen == ["before", "after", "everywhere"]
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 1
    assert "Optimizer.step#AdamW8bit.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("inner_first", [True, False])
def test_under_accelerate(inner_first: bool) -> None:
    accelerator, optimizer, straight = Accelerator(cpu=True), make(attached=False), make()
    if inner_first:
        optimizer_step.attach(optimizer, Edits())
    wrapped = accelerator.prepare(optimizer)
    assert isinstance(wrapped, AcceleratedOptimizer)
    if not inner_first:
        (finding,) = optimizer_step.attach(wrapped, Edits())
        assert finding.action == "changed"
    train(wrapped, range(2))
    train(straight, range(2))
    assert_same(wrapped, straight)


@pytest.mark.parametrize("inner_first", [True, False])
def test_under_accelerate_with_a_scaler(inner_first: bool, launches: Launches) -> None:
    Accelerator(cpu=True)
    optimizer, edits = make(attached=False), Edits()
    if inner_first:
        optimizer_step.attach(optimizer, edits)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    if not inner_first:
        optimizer_step.attach(wrapped, edits)
    scaler.scale(torch.ones(()))
    for seed in range(2):
        backward(wrapped, seed)
        if seed == 1:
            grad = params_of(wrapped)[0].grad
            assert grad is not None
            grad[0, 0] = float("inf")
        wrapped.step()
        assert wrapped.step_was_skipped == (seed == 1)
    assert (launches.count, launches.theirs) == (2, 0)
    edits.rollback()
    if not inner_first:
        train(wrapped, (2,))
        assert (launches.count, launches.theirs) == (2, len(SIZES))


def test_overridden_parameters_are_theirs(launches: Launches) -> None:
    optimizer = make()
    GlobalOptimManager.get_instance().override_config(params_of(optimizer)[0], "optim_bits", 32)
    train(optimizer, range(2))
    assert (launches.count, launches.theirs) == (4, 2)
    assert optimizer.state[params_of(optimizer)[0]]["state1"].dtype == torch.float32
    GlobalOptimManager.get_instance().override_config(params_of(optimizer)[1], "lr", 0.0)
    before = params_of(optimizer)[1].detach().clone()
    train(optimizer, (2,))
    assert launches.theirs == 4
    assert torch.equal(params_of(optimizer)[1], before)


def test_undone_and_done_twice(launches: Launches) -> None:
    optimizer, edits = make(attached=False), Edits()
    optimizer_step.attach(optimizer, edits)
    (again,) = optimizer_step.attach(optimizer, edits)
    assert (again.action, again.reason) == ("skipped", "steps in one launch already")
    train(optimizer, (0,))
    assert launches.theirs == 0
    edits.rollback()
    assert "step" not in vars(optimizer)
    train(optimizer, (1,))
    assert launches.theirs == len(SIZES)
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 2


class OwnStep(bnb.optim.AdamW8bit):
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        super().update_step(group, p, gindex, pindex)


def with_max_unorm(params: Any) -> Any:
    optimizer = bnb.optim.AdamW8bit(params)
    optimizer.args.max_unorm = 0.5
    return optimizer


def with_other_step(params: Any) -> Any:
    optimizer = bnb.optim.AdamW8bit(params)
    vars(optimizer)["step"] = lambda closure=None: None
    return optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "reason"),
    [
        (bnb.optim.PagedAdamW8bit, "paged"),
        (bnb.optim.Lion8bit, "neither Adam nor AdamW"),
        (bnb.optim.AdEMAMix8bit, "ademamix"),
        (bnb.optim.SGD8bit, "neither Adam nor AdamW"),
        (with_max_unorm, "max_unorm=0.5"),
        (with_other_step, "replaced by another"),
        (OwnStep, "update_step is not bitsandbytes' own"),
        (lambda params: torch.optim.AdamW(params, fused=True), "one launch already"),
        (torch.optim.AdamW, "fused=True"),
        (torch.optim.SGD, "neither Adam nor AdamW"),
    ],
)
def test_others_are_left_alone(make_optimizer: Any, reason: str) -> None:
    options = {"momentum": 0.9, "lr": 0.1} if make_optimizer is bnb.optim.SGD8bit else {}
    optimizer = make_optimizer(make_params(), **options)
    step = vars(optimizer).get("step")
    (finding,) = optimizer_step.attach(optimizer, Edits())
    assert finding.action == "skipped"
    assert reason in finding.reason, finding.reason
    assert vars(optimizer).get("step") is step


@pytest.mark.parametrize("kind", [bnb.optim.Adam, bnb.optim.AdamW, bnb.optim.AdamW32bit, bnb.optim.Adam8bit])
def test_every_adam(kind: Any, launches: Launches) -> None:
    optimizer = kind(make_params(), lr=1e-2)
    optimizer_step.attach(optimizer, Edits())
    train(optimizer, range(2))
    assert launches.theirs == 0
    assert launches.count == (4 if kind is bnb.optim.Adam8bit else 2)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_step, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = optimizer_step.attach(make(attached=False), Edits())
    assert finding.reason == "the kernels need Triton and a CUDA GPU"
