"""The stages that decoder layers are made of, over the ops of this package.

Values are (B, S, width): queries, keys and values too have their heads side by side. Where an op's kernels cannot take
a call (another device, another dtype, an op that a plugin overrides), its function runs forward, and backward is what
autograd makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sloth_kernels.gradients import Leading
from sloth_kernels.op import Op
from sloth_kernels.ops import attention, rms_norm, rope
from sloth_kernels.ops.attention import AttentionSpec

Grads = tuple[Sequence[Any], Sequence[torch.Tensor | None]]
Read = Callable[[], "torch.Tensor | None"]
Room = Callable[[], int]
"""How many columns to leave free behind each row of a value, for ``Linears`` to use."""


def no_room() -> int:
    """None."""
    return 0


def plus(total: torch.Tensor | None, term: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum in new memory; one of them where the other is None."""
    if total is None or term is None:
        return term if total is None else total
    return total + term


def vjp(
    function: Callable[..., Any], inputs: Sequence[Any], dys: Sequence[torch.Tensor | None], wants: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of the wanted ``inputs`` of ``function``, by autograd over a second run of it."""
    leaves = [t.detach().requires_grad_() if wanted else t for t, wanted in zip(inputs, wants, strict=True)]
    with torch.enable_grad():
        outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None and y.requires_grad]
    wanted = [leaf for leaf, want in zip(leaves, wants, strict=True) if want]
    grads = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True))
    return [next(grads) if want else None for want in wants]


def heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """(B, S, heads * width) as (B, heads, S, width), a view."""
    return by_head(x, width).transpose(1, 2)


def by_head(x: torch.Tensor, width: int) -> torch.Tensor:
    """(B, S, heads * width) as (B, S, heads, width), a view."""
    batch, length, wide = x.shape
    return x.view(batch, length, wide // width, width)


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, width) as (B, S, heads * width); a view where the memory lies so."""
    return x.transpose(1, 2).flatten(2)


def dying(values: Mapping[str, Any]) -> Sequence[str]:
    """The values that nobody looks at after this stage: their memory may be overwritten."""
    return getattr(values, "dying", ())


class NamedStage:
    """``reads``, ``writes`` and ``needs`` of a stage; a stage without parameters is bound as it is."""

    operands: Sequence[torch.Tensor | None] = ()
    views = False
    """Whether what it writes is memory of what it reads."""
    overwrites: tuple[str, ...] = ()
    """Reads whose gradients take their memory in backward, where nobody looks at them after it."""

    def __init__(self, reads: Sequence[str], writes: Sequence[str], needs: Sequence[str]) -> None:
        self.reads, self.writes, self.needs = tuple(reads), tuple(writes), tuple(needs)

    def bind(self, autocast: torch.dtype | None) -> Any:
        return self

    def flops(self, tokens: int, length: int, widths: Mapping[str, float]) -> float:
        """Operations of matrix products in forward, for ``tokens`` in rows of ``length``.

        ``widths`` has the bytes a token of each value.
        """
        return 0.0

    def traffic(self) -> float:
        """Bytes that move beside its values, whatever the number of tokens."""
        return 0.0

    def workspace(self, tokens: int, widths: Mapping[str, float], autocast: torch.dtype | None) -> int:
        """Bytes that it takes while it runs, forward or backward, beside its values and their gradients."""
        return 0


class Norm(NamedStage):
    """Root mean square norm of rows, or of each head where ``head_width`` is given: x -> y, 1 / rms."""

    def __init__(
        self,
        x: str,
        y: str,
        weight: Read,
        eps: float,
        variant: str,
        op: Op,
        head_width: int | None = None,
        room: Room = no_room,
    ) -> None:
        rstd = f"{y}.rstd"
        super().__init__((x,), (y, rstd), (x, rstd))
        self.weight, self.eps, self.variant, self.op = weight, eps, variant, op
        self.head_width, self.room = head_width, room

    def bind(self, autocast: torch.dtype | None) -> _BoundNorm:
        return _BoundNorm(self, self.weight())


class _BoundNorm:
    def __init__(self, stage: Norm, weight: torch.Tensor | None) -> None:
        self.stage, self.operands = stage, (weight,)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        (weight,), stage = self.operands, self.stage
        rows = x if stage.head_width is None else by_head(x, stage.head_width)
        if stage.op.fn is rms_norm.rms_norm and rms_norm.kernel_takes(rows, weight):
            y, _, rstd_T = rms_norm.forward(rows, weight, stage.eps, stage.variant, stage.room())
        else:
            y, rstd_T = stage.op.fn(rows, weight, stage.eps, stage.variant), None
        return y if stage.head_width is None else y.view(x.shape), rstd_T

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        (weight,), stage = self.operands, self.stage
        x, rstd_T = (values[name] for name in stage.needs)
        rows, dy = x, dys[0]
        if stage.head_width is not None:
            rows, dy = by_head(x, stage.head_width), by_head(dy, stage.head_width)
        if rstd_T is None:
            dx, dw = vjp(lambda *xw: stage.op.fn(*xw, stage.eps, stage.variant), (rows, weight), (dy,), wants)
            return (plus(dxs[0], None if dx is None else dx.view(x.shape)),), (dw,)
        add = dxs[0] if dxs[0] is not None and dxs[0].dtype == x.dtype else None
        dx, dw = rms_norm.backward(dy, rows, weight, rstd_T, stage.variant, wants[1], add)
        dx = dx if stage.head_width is None else dx.view(x.shape)
        return (dx if add is not None else plus(dxs[0], dx),), (dw,)


HEADS_AT = 2
"""The dimension of heads where each token's lie side by side, as ``rope`` counts them."""


class Rope(NamedStage):
    """Rotary position embedding: queries, keys, cos, sin -> queries, keys.

    In backward ``room`` columns are left free behind the gradients of both, which lie side by side then.
    """

    def __init__(
        self, q: str, k: str, q_out: str, k_out: str, head_width: int, variant: str, op: Op, room: Room = no_room
    ) -> None:
        super().__init__((q, k, "cos", "sin"), (q_out, k_out), ("cos", "sin"))
        self.head_width, self.variant, self.op, self.room = head_width, variant, op, room

    def bind(self, autocast: torch.dtype | None) -> _BoundRope:
        return _BoundRope(self)


class _BoundRope:
    operands: Sequence[torch.Tensor | None] = ()

    def __init__(self, stage: Rope) -> None:
        self.stage = stage
        self.dtype = torch.float32

    def forward(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, ...]:
        self.dtype, stage = q.dtype, self.stage
        turned = by_head(q, stage.head_width), by_head(k, stage.head_width)
        own = stage.op.fn is rope.rope and rope.kernel_takes(*turned, cos, sin, stage.variant, HEADS_AT)
        function = rope.forward if own else stage.op.fn
        q_out, k_out = function(*turned, cos, sin, stage.variant, HEADS_AT)
        return q_out.flatten(2), k_out.flatten(2)

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        cos, sin = values["cos"], values["sin"]
        stage = self.stage
        dq, dk = (by_head(dy, stage.head_width) for dy in dys)
        if stage.op.fn is rope.rope and rope.kernel_takes(dq, dk, cos, sin, stage.variant, HEADS_AT):
            if dxs[0] is None and dxs[1] is None and (room := stage.room()):
                return (*self._with_room(dq, dk, cos, sin, room), None, None), ()
            dq, dk = rope.backward(dq, dk, cos, sin, stage.variant, HEADS_AT, self.dtype)
        else:
            # The rotation is linear: its gradient is the same wherever it is taken.
            at = [d.to(self.dtype) for d in (dq, dk)]
            turned = vjp(lambda q, k: stage.op.fn(q, k, cos, sin, stage.variant, HEADS_AT), at, (dq, dk), (True, True))
            dq, dk = (torch.zeros_like(a) if d is None else d for a, d in zip(at, turned, strict=True))
        return (plus(dxs[0], dq.flatten(2)), plus(dxs[1], dk.flatten(2)), None, None), ()

    def _with_room(
        self, dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, room: int
    ) -> tuple[Leading, torch.Tensor]:
        widths, stage = [dq.shape[2:].numel(), dk.shape[2:].numel(), room], self.stage
        whole = dq.new_empty(*dq.shape[:2], sum(widths), dtype=self.dtype)
        q_part, k_part, _ = whole.split(widths, dim=-1)
        out = by_head(q_part, stage.head_width), by_head(k_part, stage.head_width)
        rope.backward_into((dq, dk), out, cos, sin, stage.variant, HEADS_AT)
        return Leading(q_part, whole), k_part


class Attention(NamedStage):
    """Softmax attention: queries, keys, values, mask -> what the heads read, and what its backward needs beside."""

    def __init__(self, q: str, k: str, v: str, out: str, head_width: int, spec: AttentionSpec) -> None:
        extras = f"{out}.extras"
        super().__init__((q, k, v, "mask"), (out, extras), (q, k, v, out, extras, "mask"))
        self.head_width, self.spec = head_width, spec

    def flops(self, tokens: int, length: int, widths: Mapping[str, float]) -> float:
        """Two products of half a square, where it is causal."""
        elements = widths[self.reads[0]] / 2
        return 4.0 * tokens * length * elements * (0.5 if self.spec.causal else 1.0)

    def bind(self, autocast: torch.dtype | None) -> _BoundAttention:
        return _BoundAttention(self, autocast)


class _BoundAttention:
    operands: Sequence[torch.Tensor | None] = ()
    recordable = False
    """Its kernels follow from the documents of a pass."""

    def __init__(self, stage: Attention, autocast: torch.dtype | None) -> None:
        self.stage, self.autocast = stage, autocast

    def _heads(self, flat: torch.Tensor) -> torch.Tensor:
        return heads(flat if self.autocast is None else flat.to(self.autocast), self.stage.head_width)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[Any, ...]:
        out, extras = attention.forward(self._heads(q), self._heads(k), self._heads(v), mask, None, self.stage.spec)
        return side_by_side(out), extras

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        q, k, v, out, extras, mask = (values[name] for name in self.stage.needs)
        dout, at = heads(dys[0], self.stage.head_width), heads(out, self.stage.head_width)
        *grads, _ = attention.backward(
            dout, self._heads(q), self._heads(k), self._heads(v), at, extras, mask, None, self.stage.spec
        )
        flat = (side_by_side(grad).to(t.dtype) for grad, t in zip(grads, (q, k, v), strict=True))
        return (*(plus(dx, grad) for dx, grad in zip(dxs, flat, strict=False)), None), ()


class Split(NamedStage):
    """One value's columns as several values, which are views of it: whoever keeps one of them keeps all of it."""

    views = True

    def __init__(self, x: str, ys: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__((x,), ys, ())
        self.widths = list(widths)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        """The parts."""
        return tuple(x.split(self.widths, dim=-1))

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        """The parts' gradients side by side."""
        some = next(dy for dy in dys if dy is not None)
        parts = [
            some.new_zeros(*some.shape[:-1], width) if dy is None else dy
            for dy, width in zip(dys, self.widths, strict=True)
        ]
        return (plus(dxs[0], torch.cat(parts, dim=-1)),), ()


class Residual(NamedStage):
    """x + scale * branch."""

    def __init__(self, x: str, branch: str, y: str, scale: float = 1.0) -> None:
        super().__init__((x, branch), (y,), ())
        self.scale = scale

    def bind(self, autocast: torch.dtype | None) -> _BoundResidual:
        return _BoundResidual(self.scale)


class _BoundResidual:
    operands: Sequence[torch.Tensor | None] = ()

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.dtypes = torch.float32, torch.float32

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[Any, ...]:
        self.dtypes = x.dtype, branch.dtype
        return (x + branch if self.scale == 1.0 else x + branch * self.scale,)

    def backward(
        self, values: Mapping[str, Any], dys: Sequence[Any], dxs: Sequence[Any], wants: Sequence[bool]
    ) -> Grads:
        dy = dys[0]
        dx = dy if dy.dtype == self.dtypes[0] else dy.to(self.dtypes[0])
        branch = dy if dy.dtype == self.dtypes[1] else dy.to(self.dtypes[1])
        return (plus(dxs[0], dx), plus(dxs[1], branch if self.scale == 1.0 else branch * self.scale)), ()
