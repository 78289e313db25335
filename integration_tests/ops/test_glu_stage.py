"""The gated unit between linears with adapters: the gradients are those of products of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from integration_tests.ops.test_program import Layer4bit, gradients
from integration_tests.recordings import Repeats
from sloth_kernels import glu_contractions, glu_stage, launch
from sloth_kernels.adapters import Adapter
from sloth_kernels.glu_stage import Glu
from sloth_kernels.gradients import Contracted
from sloth_kernels.linears import Linears
from sloth_kernels.program import Program
from sloth_kernels.recording import Tape

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="layers of bfloat16: see gpu/test_layer_programs.py")
Asked = tuple[bool, bool, bool]
"""Of one call of the kernel: products of dgate, of dup, of h."""


class Kind(NamedTuple):
    """Which linears have no adapters, which adapters' matrices do not train, and what the kernel is asked for."""

    bare: tuple[str, ...]
    frozen: tuple[str, ...]
    asked: list[Asked]


KINDS = {
    "all": Kind((), (), [(True, True, True)]),
    "down alone": Kind(("gate", "up", "q", "k", "v", "o"), (), [(False, False, True)]),
    "gate and down": Kind(("up",), (), [(True, False, True)]),
    "gate alone": Kind(("up", "down"), (), []),
    "all but down": Kind(("down",), (), []),
    "none around it": Kind(("gate", "up", "down"), (), []),
    "B of gate frozen": Kind((), ("gate.B",), [(False, True, True)]),
    "A of down frozen": Kind((), ("down.A",), [(True, True, False)]),
    "all B frozen": Kind((), ("gate.B", "up.B", "down.B"), [(False, False, True)]),
    "nothing around it trains": Kind((), ("gate.B", "up.B", "down.A", "down.B"), []),
}


KEPT = {
    (): True,
    ("h",): False,
    ("gate", "h"): False,
    ("gate", "up"): False,
    ("gate", "up", "gate.t"): True,
    ("a",): True,
}
"""Values that stay -> whether all that the unit needs is there when the backward of the linear that reads h runs."""


class Around(Layer4bit):
    """A layer over kept dense weights; several rows are one tile, whose edges are ``test_glu_contractions``'s."""

    batch, length = 1, 3

    def __init__(self, kind: Kind, scale: float = 0.7) -> None:
        super().__init__(keeps=True, bias=scale != 1.0, scale=scale)
        for name in kind.bare:
            self.linears[name] = self.linears[name]._replace(adapters=())
        for name, matrix in (frozen.split(".") for frozen in kind.frozen):
            for adapter in self.linears[name].adapters:
                (adapter.A_RK if matrix == "A" else adapter.B_NR).requires_grad_(False)

    def operands(self) -> list[torch.Tensor]:
        return [operand for operand in super().operands() if operand.requires_grad]

    def program(self, hands_over: bool = True) -> Program:
        """Without ``hands_over`` every product is left to its own linear."""
        program = super().program()
        for stage in program.stages:
            if not hands_over and isinstance(stage, Linears):
                stage.taker = None
            elif not hands_over and isinstance(stage, Glu):
                stage.maker = None
        return program


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What the kernel was asked for, call by call."""
    found: list[Asked] = []
    original = glu_contractions.backward

    def noted(dh: Any, gate: Any, up: Any, variant: str, gate_t: Any, up_t: Any, with_h: bool, last: bool) -> Any:
        found.append((gate_t is not None, up_t is not None, with_h))
        return original(dh, gate, up, variant, gate_t, up_t, with_h, last)

    monkeypatch.setattr(glu_contractions, "backward", noted)
    return found


def assert_close(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.7, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str, scale: float, asked: list[Asked]) -> None:
    kind = KINDS[name]
    layer, apart = Around(kind, scale), Around(kind, scale)
    theirs = gradients(apart.program(hands_over=False)(apart.x, apart.constants), apart)
    assert not asked
    assert_close(gradients(layer.program()(layer.x, layer.constants), layer), theirs)
    assert asked == kind.asked


@pytest.mark.parametrize("kept", KEPT)
def test_whatever_is_kept(kept: tuple[str, ...], asked: list[Asked]) -> None:
    """Where something has to come back in between, dA is left to its own linear."""
    layer, apart = Around(KINDS["all"]), Around(KINDS["all"])
    theirs = gradients(apart.program(hands_over=False)(apart.x, apart.constants), apart)
    assert_close(gradients(layer.program()(layer.x, layer.constants, frozenset(kept)), layer), theirs)
    assert asked == [(True, True, KEPT[kept])]


@pytest.mark.parametrize("kept", [None, frozenset({"h"})], ids=["all", "h"])
def test_recordings(kept: frozenset[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a backward are packed as they end: nobody fills what another part has packed.

    What stands for recordings here does their work twice at first: nothing that it reads may be overwritten.
    """
    monkeypatch.setattr(glu_stage, "dying", lambda values: ())
    layer, apart, tape = Around(KINDS["all"]), Around(KINDS["all"]), Tape(Repeats(), set())
    program, alone = layer.program(), apart.program(hands_over=False)
    for _ in range(3):
        theirs = gradients(alone(apart.x, apart.constants), apart)
        assert_close(gradients(program(layer.x, layer.constants, kept, tape=tape), layer), theirs)
        for one in (layer, apart):
            one.x.data.mul_(0.9)
            for operand in one.operands():
                operand.data.mul_(1.1)
    assert not tape.broken


def test_adapters_changed_between_the_passes(asked: list[Asked]) -> None:
    """The columns that were asked for may be others by then: what does not fit is not used."""
    layer, apart = Around(KINDS["all"]), Around(KINDS["all"])
    program = layer.program()
    y, operands = program(layer.x, layer.constants), layer.operands()
    gate = layer.linears["gate"]
    wider = Adapter(layer.randn(5, gate.weight.shape[1]), layer.randn(gate.weight.shape[0], 5).requires_grad_(), 1.0)
    layer.linears["gate"] = gate._replace(adapters=(wider,))
    with torch.no_grad():
        program(layer.x, layer.constants)
    torch.manual_seed(1)
    mine = torch.autograd.grad(y, [layer.x, *operands], torch.randn_like(y))
    assert_close(list(mine), gradients(apart.program(hands_over=False)(apart.x, apart.constants), apart))
    assert asked


def test_columns_of_a_product() -> None:
    handed = Contracted(torch.zeros(3, 4), torch.arange(8.0).view(4, 2), 5)
    assert handed.columns(6, 1) is not None
    torch.testing.assert_close(handed.columns(5, 2), handed.product_NR)
    assert all(handed.columns(*other) is None for other in ((4, 2), (6, 2), (0, 1), (7, 1)))


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the interpreter, what has tensor cores."""
    most = glu_contractions.MAX_RANK
    monkeypatch.setattr(glu_contractions, "interpreting", lambda: False)
    assert glu_contractions.takes(torch.empty(3, most, dtype=torch.bfloat16))
    assert not glu_contractions.takes(torch.empty(3, most + 1, dtype=torch.bfloat16))
    assert not glu_contractions.takes(torch.empty(3, most))


@pytest.mark.parametrize("wide", ["gate", "down"])
def test_ranks_too_wide_for_the_kernel(wide: str, asked: list[Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glu_contractions, "MAX_RANK", 3)
    layers = []
    for _ in range(2):
        layer = Around(KINDS["all"])
        linear = layer.linears[wide]
        more = [
            t.detach().repeat(*n).requires_grad_()
            for t, n in zip(linear.adapters[0][:2], ((2, 1), (1, 2)), strict=True)
        ]
        layer.linears[wide] = linear._replace(adapters=(*linear.adapters, Adapter(more[0], more[1], 0.5)))
        layers.append(layer)
    layer, apart = layers
    theirs = gradients(apart.program(hands_over=False)(apart.x, apart.constants), apart)
    assert_close(gradients(layer.program()(layer.x, layer.constants), layer), theirs)
    assert asked == ([(False, True, True)] if wide == "gate" else [])
