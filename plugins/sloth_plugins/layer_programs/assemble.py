"""From a decoder layer to the program that computes the same, by structure; ``probe.py`` has the last word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sloth_backend.roles import Role
from sloth_kernels.dense_cache import DenseGroup
from sloth_kernels.glu_stage import Glu
from sloth_kernels.linears import Linears
from sloth_kernels.op import Op
from sloth_kernels.ops.attention import AttentionSpec
from sloth_kernels.program import INPUT, OUTPUT, Program
from sloth_kernels.stages import Attention, Norm, Residual, Rope, Split
from sloth_kernels.tiles import Tiled
from sloth_plugins.kernel_patching.linears import LiveLinear
from sloth_plugins.kernel_patching.match import Matcher
from sloth_plugins.kernel_patching.roles import EPS_NAMES
from sloth_plugins.layer_programs import layouts
from sloth_plugins.layer_programs.layouts import LAYOUTS, Layout

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
CONSTANTS = ("cos", "sin", "mask")
TILE_ROWS = (8192, 2048)
"""Tokens at a time that an MLP may run on where memory is short: few enough to help, enough for full products beside
4-bit weights that are made dense for each tile anew."""


class MisfitError(Exception):
    """Why a layer cannot run as a program, in one sentence."""


@dataclass
class LayerProgram:
    """A program and the linears whose state decides, at each call, whether it may run."""

    program: Program
    tiled: Mapping[int, Program]
    """Rows of a tile -> the program whose MLP runs in such tiles."""
    linears: list[LiveLinear]
    groups: list[DenseGroup]
    """Places for dense copies of 4-bit weights."""
    readers: list[LiveLinear]
    """Those of ``program`` and ``tiled``, which each have their own."""

    def forget(self) -> None:
        """Keep no parameter until the next pass: the host may be about to shard the model, and then none is in use."""
        for program in (self.program, *self.tiled.values()):
            for stage in program.stages:
                inside = stage.program.stages if isinstance(stage, Tiled) else (stage,)
                for own in inside:
                    if isinstance(own, Linears):
                        own.forget()
        for live in self.readers:
            live.forget()

    def dense_bytes(self) -> int:
        """Bytes of the dense copies of all 4-bit weights, in 16 bits, with their adapters' columns."""
        return sum(stage.dense_bytes() for stage in self.program.stages if isinstance(stage, Linears))


@dataclass(frozen=True)
class Assembler:
    """Builds the programs of one model's layers.

    Args:
        matcher: recognises norms, rotary embeddings and activations.
        ops: by name.
        roles: by name.
        attention: the model's attention implementation.
    """

    matcher: Matcher
    ops: Mapping[str, Op]
    roles: Mapping[str, Role]
    attention: str

    def candidates(self, layer: nn.Module) -> list[LayerProgram]:
        """Programs that may compute what ``layer`` does, the likeliest first.

        Raises:
            MisfitError: no program could.
        """
        if self.attention not in ATTENTION_IMPLEMENTATIONS:
            known = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise MisfitError(f"attn_implementation={self.attention!r} runs as it is; programs know {known}")
        parts = _Parts.of(layer)
        fitting = [layout for layout in LAYOUTS if layout.norms == parts.norms.keys()]
        if not fitting:
            raise MisfitError(f"no known layout has the children {', '.join([*parts.norms, parts.mlp_name])}")
        return [
            _Assembly(self, layer, parts, layout, with_rope).run() for layout in fitting for with_rope in (True, False)
        ]

    def variant(self, module: nn.Module, role: str) -> str:
        """The variant of the role's op that ``module`` computes."""
        match = self.matcher.match(module, self.roles[role], self.ops[self.roles[role].op])
        if match is None or match.variant is None:
            reason = match.reason if match is not None and match.reason else "does not look like one"
            raise MisfitError(f"its {type(module).__name__} is no {role} that the kernels know: {reason}")
        return match.variant


@dataclass(frozen=True)
class _Parts:
    """A layer's children by what they are."""

    attention: nn.Module
    mlp: nn.Module
    mlp_name: str
    norms: Mapping[str, nn.Module]

    @classmethod
    def of(cls, layer: nn.Module) -> _Parts:
        bearing = {name: child for name, child in layer._modules.items() if child is not None and _bears(child)}
        attentions = {name: child for name, child in bearing.items() if _attention_linears(child)}
        norms = {name: child for name, child in bearing.items() if _is_norm(child)}
        rest = [name for name in bearing if name not in attentions and name not in norms]
        if len(attentions) != 1 or len(rest) != 1:
            raise MisfitError(f"has the children {', '.join(bearing)}: not one attention, one MLP and norms")
        if any(True for _ in layer.parameters(recurse=False)):
            raise MisfitError("has parameters of its own")
        return cls(next(iter(attentions.values())), bearing[rest[0]], rest[0], norms)


def _bears(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    own = {name: p.dim() for name, p in module._parameters.items() if p is not None}
    return own == {"weight": 1} and not module._modules


def _attention_linears(module: nn.Module) -> bool:
    children = module._modules
    return any(name in children for name in layouts.OUTPUTS) and (
        all(name in children for name in layouts.SEPARATE) or layouts.FUSED in children
    )


class _Assembly:
    """One attempt at one layer."""

    def __init__(self, by: Assembler, layer: nn.Module, parts: _Parts, layout: Layout, with_rope: bool) -> None:
        self.by, self.layer, self.parts, self.layout, self.with_rope = by, layer, parts, layout, with_rope
        self.stages: list[Any] = []
        self.linears: list[LiveLinear] = []
        self.groups: list[DenseGroup] = []
        self.readers: list[LiveLinear] = []

    def run(self) -> LayerProgram:
        program = self._program(None)
        linears, groups = self.linears, self.groups
        rows_of_tiles = () if self.layout.parallel else TILE_ROWS
        tiled = {rows: self._program(rows) for rows in rows_of_tiles}
        return LayerProgram(program, tiled, linears, groups, self.readers)

    def _program(self, tile_rows: int | None) -> Program:
        self.stages, self.linears, self.groups = [], [], []
        layout = self.layout
        self._attention(self._norm("n1", layout.attention_in, INPUT))
        self._branch("a", "o", self._output(), layout.attention_out, INPUT, "x2")
        if tile_rows is None:
            self._mlp_part("n1" if layout.parallel else "", "x2")
        else:
            outer, self.stages = self.stages, []
            self._mlp_part("", INPUT)
            self._leave_room()
            self.stages = [*outer, Tiled("x2", OUTPUT, Program(self.stages), tile_rows)]
        self._leave_room()
        return Program(self.stages, CONSTANTS)

    def _mlp_part(self, normed: str, x: str) -> None:
        """From ``x`` to the layer's output; ``normed`` is what the MLP reads where that is there already."""
        down_proj = self._mlp(normed or self._norm("n2", self.layout.mlp_in, x))
        self._branch("h", "m", down_proj, self.layout.mlp_out, x, OUTPUT)

    def _branch(self, read: str, y: str, module: nn.Module, norm: str | None, residual: str, total: str) -> None:
        """The last linear of a branch, its norm if it has one, and the sum with ``residual``."""
        if norm is None and self._scale() == 1.0:
            self._linears(read, [total], [module], residual)
            return
        self._linears(read, [y], [module])
        self.stages.append(Residual(residual, self._norm(f"{y}.norm", norm, y), total, self._scale()))

    def _output(self) -> nn.Module:
        children = self.parts.attention._modules
        return next(child for name in layouts.OUTPUTS if (child := children.get(name)) is not None)

    def _scale(self) -> float:
        return self._first(self.layer, layouts.RESIDUAL_SCALES, 1.0)

    def _leave_room(self) -> None:
        """Let stages that write the input of one group of linears leave the columns free that it would like."""
        readers = Counter(stage.reads[0] for stage in self.stages if isinstance(stage, Linears))
        makers = {name: stage for stage in self.stages for name in stage.writes}
        for stage in self.stages:
            if isinstance(stage, Rope):
                self._leave_gradient_room(stage, makers.get(stage.reads[0]))
            if not isinstance(stage, Linears):
                continue
            x = stage.reads[0]
            maker = makers.get(x)
            stage.dense_gradient = isinstance(maker, Attention)
            if isinstance(maker, (Norm, Glu)) and readers[x] == 1:
                maker.room, stage.copies_x = stage.room, False
                stage.taker = maker if isinstance(maker, Glu) else None

    @staticmethod
    def _leave_gradient_room(stage: Rope, maker: Any) -> None:
        """Queries, keys and values of one group have one gradient of their input."""
        if isinstance(maker, Linears) and maker.writes[:-2] == stage.reads[:2]:
            stage.room = maker.gradient_room

    @staticmethod
    def _first(module: nn.Module, names: Sequence[str], default: Any) -> Any:
        return next((vars(module)[name] for name in names if vars(module).get(name) is not None), default)

    def _norm(self, y: str, child: str | None, x: str) -> str:
        if child is None:
            return x
        return self._norm_of(self.parts.norms[child], y, x, None)

    def _norm_of(self, module: nn.Module, y: str, x: str, head_width: int | None) -> str:
        variant = self.by.variant(module, "rms_norm")
        eps = self._first(module, EPS_NAMES, 0.0)
        parameters = module._parameters
        self.stages.append(Norm(x, y, lambda: parameters["weight"], eps, variant, self.by.ops["rms_norm"], head_width))
        return y

    def _linears(self, x: str, names: Sequence[str], modules: Sequence[Any], residual: str | None = None) -> None:
        own = []
        for module in modules:
            live = LiveLinear.of(module)
            if isinstance(live, str):
                raise MisfitError(live)
            own.append(live)
        self.linears += own
        self.readers += own
        self.groups.append(DenseGroup())
        self.stages.append(Linears(x, names, lambda: [live.read() for live in own], self.groups[-1], residual))

    def _attention(self, x: str) -> None:
        module = self.parts.attention
        width = self._first(module, ("head_dim",), None)
        if width is None:
            raise MisfitError("its attention does not say how wide a head is (head_dim)")
        self._qkv(x, module, width)
        q, k = self._head_norms(module, width)
        if self.with_rope:
            self.stages.append(Rope(q, k, "q", "k", width, self.by.variant(module, "rope"), self.by.ops["rope"]))
            q, k = "q", "k"
        self.stages.append(Attention(q, k, "v", "a", width, self._spec(module, width)))

    def _qkv(self, x: str, module: nn.Module, width: int) -> None:
        children = module._modules
        if layouts.FUSED not in children:
            self._linears(x, ["q0", "k0", "v"], [children[name] for name in layouts.SEPARATE])
            return
        config = vars(module).get("config")
        n_q, n_k = (getattr(config, name, 0) for name in ("num_attention_heads", "num_key_value_heads"))
        self._linears(x, ["qkv"], [children[layouts.FUSED]])
        self.stages.append(Split("qkv", ["q0", "k0", "v"], [n_q * width, n_k * width, n_k * width]))

    def _head_norms(self, module: nn.Module, width: int) -> tuple[str, str]:
        for q_norm, k_norm in layouts.HEAD_NORMS:
            norms = [module._modules.get(name) for name in (q_norm, k_norm)]
            if None not in norms:
                for norm, x, y in zip(norms, ("q0", "k0"), ("q1", "k1"), strict=True):
                    weight = norm._parameters.get("weight")  # type: ignore[union-attr]
                    per_head = weight is not None and weight.shape == (width,)
                    self._norm_of(norm, y, x, width if per_head else None)  # type: ignore[arg-type]
                return "q1", "k1"
        return "q0", "k0"

    def _spec(self, module: nn.Module, width: int) -> AttentionSpec:
        if self._first(module, ("attention_dropout",), 0.0):
            raise MisfitError("its attention has dropout: its random numbers are drawn inside the host's kernel")
        softcap = self._first(module, layouts.SOFTCAPS, None) if self.by.attention == "eager" else None
        return AttentionSpec(
            scale=self._first(module, ("scaling",), width**-0.5),
            softcap=softcap,
            causal=bool(self._first(module, ("is_causal",), True)),
        )

    def _mlp(self, x: str) -> nn.Module:
        """Up to ``h``; the linear that reads it is returned."""
        module = self.parts.mlp
        variant, children, maker = self.by.variant(module, "glu"), module._modules, None
        if "gate_up_proj" in children:
            self._linears(x, ["gate_up"], [children["gate_up_proj"]])
            half = self.linears[-1].read().weight.shape[0] // 2
            self.stages.append(Split("gate_up", ["gate", "up"], [half, half]))
        else:
            self._linears(x, ["gate", "up"], [children["gate_proj"], children["up_proj"]])
            maker = self.stages[-1]
        self.stages.append(Glu("gate", "up", "h", variant, self.by.ops["glu"], maker))
        return children["down_proj"]  # type: ignore[return-value]
