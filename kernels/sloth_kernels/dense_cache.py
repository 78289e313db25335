"""Dense copies of 4-bit weights, kept where there is memory for them and given up where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sloth_kernels.adapters import Siblings
from sloth_kernels.joined import Joined, Kept, Made, block_of, columns_of
from sloth_kernels.relief import givers


class DenseGroup:
    """The dense weights of linears that share an input, each (N, K + columns): kept while ``keeps`` says so."""

    def __init__(self) -> None:
        self.keeps = False
        self.is_told = False
        """Whether ``expire`` is called whenever adapters may have changed; else they are copied at every call."""
        self._kept: Kept | None = None
        self._of: Siblings | None = None
        self._dtype: torch.dtype | None = None
        self._fresh = False

    def joined(self, siblings: Siblings, dtype: torch.dtype) -> Joined:
        """Each weight in ``dtype`` with s B in its adapters' columns, as B is now."""
        if not self.keeps:
            return Made(siblings, dtype)
        kept = self._kept
        if kept is None or siblings is not self._of or dtype != self._dtype:
            kept = self._kept = Kept.of(siblings, self._block(siblings, dtype))
            self._of, self._dtype, self._fresh = siblings, dtype, False
        if not self._fresh:
            kept.fill(siblings)
            self._fresh = self.is_told
        return kept

    def again(self, siblings: Siblings, dtype: torch.dtype) -> Joined:
        """What ``joined`` returned last, if that was for ``siblings`` and is still there; else made anew."""
        return self.kept(siblings) or Made(siblings, dtype)

    def kept(self, siblings: Siblings) -> Kept | None:
        """What is kept for ``siblings``."""
        return self._kept if siblings is self._of else None

    def expire(self) -> None:
        """The adapters may have changed: optimizers that write through pointers leave no other sign of it."""
        self._fresh = False

    def empty(self) -> bool:
        """Let go of the matrices; whether there were any."""
        had = self._kept is not None
        self._kept = self._of = None
        return had

    def _block(self, siblings: Siblings, dtype: torch.dtype) -> torch.Tensor:
        """The one that is there, where it is of the same linears and as wide; else a new one."""
        width = siblings.linears[0].weight.shape[1] + columns_of(siblings.linears)
        if self._kept is not None and self._of is not None:
            pairs = zip(siblings.linears, self._of.linears, strict=True)
            there = self._kept
            if dtype == self._dtype and there.width == width and all(a.weight is b.weight for a, b in pairs):
                return there.block
        self.empty()
        return block_of(siblings.linears, width, dtype)


class DenseCache:
    """The groups of one model's layers, in the order in which they run; the first ``held`` layers keep theirs."""

    def __init__(self, layers: Sequence[Sequence[DenseGroup]]) -> None:
        self.layers = [list(groups) for groups in layers]
        self.held = 0
        self.on_relief: Callable[[], None] | None = None
        """Called when the matrices had to be given up, the device being out of memory."""
        givers.add(self)
        for groups in self.layers:
            for group in groups:
                group.is_told = True

    def expire(self) -> None:
        """A pass begins: adapters may have changed since they were copied."""
        for groups in self.layers:
            for group in groups:
                group.expire()

    def hold(self, count: int) -> None:
        """From now on the first ``count`` layers keep dense matrices, the others none."""
        if count == self.held:
            return
        self.held = count
        for i, groups in enumerate(self.layers):
            for group in groups:
                group.keeps = i < count
                if not group.keeps:
                    group.empty()

    def give_up(self) -> bool:
        """Let go of all matrices and keep none from now on; whether there were any."""
        freed = sum(group.empty() for groups in self.layers for group in groups)
        self.hold(0)
        if freed and self.on_relief is not None:
            self.on_relief()
        return freed > 0
