"""Programs: whatever is kept, the output and every gradient are those of autograd over the same mathematics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional

from integration_tests.four_bit import from_bitsandbytes
from sloth_kernels import joined, launch, relief
from sloth_kernels.adapters import Adapter, LoraLinear
from sloth_kernels.frozen_weight import DenseWeight, Weight4bit
from sloth_kernels.glu_stage import Glu
from sloth_kernels.linears import Linears
from sloth_kernels.ops import attention, glu, rms_norm, rope
from sloth_kernels.ops.attention import AttentionSpec
from sloth_kernels.program import Program
from sloth_kernels.stages import Attention, Norm, Residual, Rope, Split
from sloth_kernels.tiles import Tiled
from sloth_kernels.values import Here, Park

B, S, H, HEADS, KV, D, WIDE, R = 2, 5, 12, 3, 1, 4, 20, 2


class Layer:
    """A pre-norm layer with adapters, all in float64, as a program and as plain torch."""

    batch, length = B, S

    def __init__(self, fused: bool = False, trained_weights: bool = False, scale: float = 0.7) -> None:
        self.scale = scale
        self.generator = torch.Generator().manual_seed(0)
        self.norms = [self.randn(H).requires_grad_(trained_weights) for _ in range(2)]
        shapes = (
            {"qkv": ((HEADS + 2 * KV) * D, H)} if fused else {"q": (HEADS * D, H), "k": (KV * D, H), "v": (KV * D, H)}
        )
        shapes |= {"o": (H, HEADS * D), "gate": (WIDE, H), "up": (WIDE, H), "down": (H, WIDE)}
        self.linears = {name: self.linear(shape, trained_weights) for name, shape in shapes.items()}
        self.fused = fused
        self.x = self.randn(self.batch, self.length, H).requires_grad_()
        angles = self.randn(self.batch, self.length, D)
        self.constants = {"cos": angles.cos(), "sin": angles.sin(), "mask": None}
        self.spec = AttentionSpec(scale=0.4)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * 0.5

    def linear(self, shape: tuple[int, int], trained: bool) -> LoraLinear:
        adapter = Adapter(self.randn(R, shape[1]).requires_grad_(), self.randn(shape[0], R).requires_grad_(), 1.5)
        weight = DenseWeight(self.randn(*shape).requires_grad_(trained))
        return LoraLinear(weight, self.randn(shape[0]).requires_grad_(trained), () if trained else (adapter,))

    def operands(self) -> list[torch.Tensor]:
        found = [*self.norms]
        for weight, bias, adapters in self.linears.values():
            found += [weight.weight, bias, *(t for a in adapters for t in (a.A_RK, a.B_NR))]  # type: ignore[attr-defined]
        return [t for t in found if t.requires_grad]

    def matrix(self, name: str) -> torch.Tensor:
        return self.linears[name].weight.weight  # type: ignore[attr-defined]

    def program(self) -> Program:
        def read(*names: str) -> Any:
            return lambda: [self.linears[name] for name in names]

        qkv: list[Any] = [Linears("n1", ["q0", "k0", "v"], read("q", "k", "v"))]
        if self.fused:
            widths = [HEADS * D, KV * D, KV * D]
            qkv = [Linears("n1", ["qkv"], read("qkv")), Split("qkv", ["q0", "k0", "v"], widths)]
        norm1, norm2 = self.norms
        stages = [
            Norm("x", "n1", lambda: norm1, 1e-6, "cast_scale", rms_norm.OP),
            *qkv,
            Rope("q0", "k0", "q", "k", D, "half", rope.OP),
            Attention("q", "k", "v", "a", D, self.spec),
            *self.branch("a", "o", read("o"), "x", "x2"),
            Norm("x2", "n2", lambda: norm2, 1e-6, "scale_cast_plus_one", rms_norm.OP),
            gate_up := Linears("n2", ["gate", "up"], read("gate", "up")),
            Glu("gate", "up", "h", "silu", glu.OP, gate_up),
            *self.branch("h", "m", read("down"), "x2", "y"),
        ]
        return Program(stages, ("cos", "sin", "mask"))

    def branch(self, x: str, y: str, read: Any, residual: str, total: str) -> list[Any]:
        """A branch's last linear and the sum, which is part of its product where nothing is scaled."""
        if self.scale == 1.0:
            return [Linears(x, [total], read, residual=residual)]
        return [Linears(x, [y], read), Residual(residual, y, total, self.scale)]

    def truth(self) -> torch.Tensor:
        def call(name: str, x: torch.Tensor) -> torch.Tensor:
            _, bias, adapters = self.linears[name]
            y = F.linear(x, self.matrix(name), bias)
            return y + sum(F.linear(F.linear(x, a.A_RK), a.B_NR) * a.scale for a in adapters)

        x, (norm1, norm2) = self.x, self.norms
        n = rms_norm.reference(x, norm1, 1e-6, "cast_scale")
        parts = call("qkv", n).split([HEADS * D, KV * D, KV * D], -1) if self.fused else [call(i, n) for i in "qkv"]
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in parts)
        q, k = rope.reference(q, k, self.constants["cos"], self.constants["sin"], "half", 1)
        a = attention.reference(q, k, v, None, None, spec=self.spec)
        x2 = x + self.scale * call("o", a.transpose(1, 2).flatten(2))
        n = rms_norm.reference(x2, norm2, 1e-6, "scale_cast_plus_one")
        return x2 + self.scale * call("down", F.silu(call("gate", n)) * call("up", n))


def gradients(y: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
    inputs = [layer.x, *layer.operands()]
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, inputs, torch.randn_like(y)))


def assert_same(mine: list[torch.Tensor], true: list[torch.Tensor]) -> None:
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


KEPT_SETS = [
    *(frozenset(s) for n in range(3) for s in itertools.combinations(("x2", "gate", "q", "a", "a.extras", "h"), n)),
    frozenset({"a", "a.extras", "q", "k", "v"}),
    frozenset({"gate", "up", "n2", "gate.t"}),
]


@pytest.mark.parametrize("scale", [0.7, 1.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_every_gradient_whatever_is_kept(fused: bool, trained: bool, scale: float) -> None:
    layer = Layer(fused, trained, scale)
    program, true = layer.program(), gradients(layer.truth(), layer)
    torch.testing.assert_close(program(layer.x, layer.constants), layer.truth())
    for kept in [None, *KEPT_SETS]:
        kept = kept if kept is None else kept & program.savable
        assert_same(gradients(program(layer.x, layer.constants, kept), layer), true)


@pytest.mark.parametrize("rows", [1, 3, 10, 64])
@pytest.mark.parametrize("trained", [False, True])
def test_tiles_change_nothing(rows: int, trained: bool) -> None:
    layer = Layer(trained_weights=trained)
    true = gradients(layer.truth(), layer)
    *_, norm, gate_up, glu_stage, down, _ = layer.program().stages
    inside = Program([renamed(norm, "x2", "x"), gate_up, glu_stage, down, Residual("x", "m", "y", 0.7)])
    program = Program([*layer.program().stages[:6], Tiled("x2", "y", inside, rows)], layer.constants)
    for kept in (frozenset(), program.savable):
        y = program(layer.x, layer.constants, kept)
        torch.testing.assert_close(y, layer.truth())
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, [layer.x, *layer.operands()], torch.randn_like(y))
        assert_same(list(grads), true)


def renamed(stage: Any, old: str, new: str) -> Any:
    """The stage, reading ``new`` for ``old``."""
    for field in ("reads", "needs"):
        setattr(stage, field, tuple(new if name == old else name for name in getattr(stage, field)))
    return stage


def test_backward_again_recomputes_what_the_first_let_go_of() -> None:
    layer = Layer()
    y = layer.program()(layer.x, layer.constants)
    inputs, dy = [layer.x, *layer.operands()], torch.ones_like(y)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert_same(list(torch.autograd.grad(y, inputs, dy)), list(first))


class Elsewhere:
    """Parked values in a list; the order in which they come back is noted."""

    def __init__(self) -> None:
        self.returned: list[torch.Size] = []

    def put(self, value: torch.Tensor) -> Any:
        copy = value.clone()

        def restore() -> torch.Tensor:
            self.returned.append(copy.shape)
            return copy

        return Here(restore)


@pytest.mark.parametrize("parked", [{"x2"}, {"a", "x2"}, {"gate", "up", "q", "k", "v", "a", "x2", "n1", "n2", "h"}])
def test_parked_values_come_back_when_they_are_needed(parked: set[str]) -> None:
    layer, elsewhere = Layer(), Elsewhere()
    program, true = layer.program(), gradients(layer.truth(), layer)
    names = frozenset(parked)
    kept = names | {"a.extras", "q0.t", "gate.t"}
    y = program(layer.x, layer.constants, kept, None, Park(names, elsewhere.put))
    assert not elsewhere.returned
    assert_same(gradients(y, layer), true)
    assert len(elsewhere.returned) == len(names)


def test_a_parked_value_for_which_there_is_no_room_is_asked_for_again() -> None:
    layer, refused = Layer(), []

    def put(value: torch.Tensor) -> Any:
        def restore() -> torch.Tensor:
            if len(refused) < 1:
                refused.append(value.shape)
                raise torch.OutOfMemoryError("no memory left, the test says")
            return value

        return Here(restore)

    true = gradients(layer.truth(), layer)
    y = layer.program()(layer.x, layer.constants, frozenset({"x2"}), None, Park(frozenset({"x2"}), put))
    assert_same(gradients(y, layer), true)
    assert refused


def test_frozen_input_needs_no_gradient() -> None:
    layer = Layer()
    true = gradients(layer.truth(), layer)[1:]
    y = layer.program()(layer.x.detach(), layer.constants)
    torch.manual_seed(1)
    assert_same(list(torch.autograd.grad(y, layer.operands(), torch.randn_like(y))), true)


def test_an_operand_changed_in_between_is_noticed() -> None:
    layer = Layer()
    y = layer.program()(layer.x, layer.constants)
    with torch.no_grad():
        layer.operands()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_stage_that_reads_what_nobody_writes_is_refused() -> None:
    with pytest.raises(ValueError, match="gate"):
        Program([Glu("gate", "up", "y", "silu", glu.OP)])


class Layer4bit(Layer):
    """The same over 4-bit weights, in float32, whose dense matrices may be kept."""

    def __init__(self, keeps: bool, bias: bool = True, scale: float = 0.7) -> None:
        self.keeps, self.bias = keeps, bias
        super().__init__(scale=scale)

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).float()

    def linear(self, shape: tuple[int, int], trained: bool) -> LoraLinear:
        frozen = super().linear(shape, False)
        packed, state = functional.quantize_4bit(frozen.weight.weight, blocksize=64, quant_type="nf4")  # type: ignore[attr-defined]
        weight = Weight4bit(from_bitsandbytes(packed, state))
        more = Adapter(self.randn(1, shape[1]).requires_grad_(), self.randn(shape[0], 1).requires_grad_(), 1.0)
        return LoraLinear(weight, frozen.bias_N if self.bias else None, (*frozen.adapters, more))

    def operands(self) -> list[torch.Tensor]:
        return [t for linear in self.linears.values() for a in linear.adapters for t in (a.A_RK, a.B_NR)]

    def matrix(self, name: str) -> torch.Tensor:
        return self.linears[name].weight.dense(torch.float32)

    def program(self) -> Program:
        program = super().program()
        for stage in program.stages:
            if isinstance(stage, Linears):
                stage.group.keeps = self.keeps
        for maker, reader in zip(program.stages, program.stages[1:], strict=False):
            if isinstance(maker, (Norm, Glu)) and isinstance(reader, Linears):
                maker.room = reader.room
                reader.taker = maker if isinstance(maker, Glu) else None
            if isinstance(maker, Attention) and isinstance(reader, Linears):
                reader.dense_gradient = True
            if isinstance(maker, Linears) and isinstance(reader, Rope):
                reader.room = maker.gradient_room
        return program


@pytest.mark.parametrize("scale", [0.7, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_kept_dense_weights_change_nothing(bias: bool, scale: float) -> None:
    """Beside rounding: one product takes the place of two."""
    layer, apart = Layer4bit(True, bias, scale), Layer4bit(False, bias, scale)
    y, true = layer.program()(layer.x, layer.constants), apart.truth()
    torch.testing.assert_close(y, true, rtol=1e-4, atol=5e-5)
    for mine, theirs in zip(gradients(y, layer), gradients(true, apart), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-5)


def test_one_product_for_the_gradients_of_a_group_whose_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of queries and keys lie side by side, with room for that of the values."""
    found: list[bool] = []
    original = joined._side_by_side

    def watched(*args: Any) -> torch.Tensor | None:
        whole = original(*args)
        found.append(whole is not None)
        return whole

    monkeypatch.setattr(joined, "_side_by_side", watched)
    layer = Layer4bit(keeps=True)
    gradients(layer.program()(layer.x, layer.constants), layer)
    gate_up_and_down, qkv = [False, False], [launch.interpreting()]  # elsewhere the rotation takes its reference
    assert found == gate_up_and_down + qkv


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_columns_are_left_free_for_adapters_that_read_another_x(dropout: float) -> None:
    """Masks of dropout may follow from how x lies, and no product would use the columns."""
    linear = Layer4bit(keeps=True).linears["o"]
    adapters = tuple(adapter._replace(dropout=dropout) for adapter in linear.adapters)
    stage = Linears("x", ["y"], lambda: [linear._replace(adapters=adapters)])
    stage.bind(None)
    assert (stage.room() == 0) == bool(dropout)
    assert stage.contractions() == [(0, 0 if dropout else R + 1)]


def test_kept_dense_weights_follow_the_adapters() -> None:
    """B changes without a sign of it, as optimizers that write through pointers leave none."""
    layer = Layer4bit(keeps=True)
    program = layer.program()
    program(layer.x, layer.constants)
    for operand in layer.operands():
        operand.data.mul_(1.5)
    torch.testing.assert_close(program(layer.x, layer.constants), layer.truth(), rtol=1e-4, atol=5e-5)


class Scarce:
    """Runs out of memory the first ``times`` it is asked to run a stage."""

    def __init__(self, bound: Any, times: int) -> None:
        self.bound, self.times, self.operands = bound, times, bound.operands

    def forward(self, *inputs: Any) -> Any:
        self._spend()
        return self.bound.forward(*inputs)

    def backward(self, *args: Any) -> Any:
        return self.bound.backward(*args)

    def _spend(self) -> None:
        self.times -= 1
        if self.times >= 0:
            raise torch.OutOfMemoryError("no memory left, the test says")


def test_out_of_memory_gives_up_what_other_calls_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    true = gradients(layer.truth(), layer)
    program, told = layer.program(), []
    earlier = program(layer.x, layer.constants, None, lambda: told.append("earlier"))
    stage = program.stages[5]
    bind = type(stage).bind
    monkeypatch.setattr(type(stage), "bind", lambda self, autocast: Scarce(bind(self, autocast), int(self is stage)))
    y = program(layer.x, layer.constants, None)
    assert told == ["earlier"]
    assert_same(gradients(y, layer), true)
    assert_same(gradients(earlier, layer), true)


def test_out_of_memory_with_nothing_to_give_up_is_raised() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("no memory left, the test says")

    for giver in list(relief.givers):
        giver.give_up()
    with pytest.raises(torch.OutOfMemoryError):
        relief.with_relief(run)
