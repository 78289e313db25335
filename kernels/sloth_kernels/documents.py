"""Documents: rows laid end to end in one row of tokens, and the mask that keeps them apart without being written out.

A row of T tokens holds n documents. A query sees the keys of its own document that do not come after it: a square of T²
that ``Documents`` says in n numbers. Kernels that know ``DocumentMask`` read the numbers; to all other code it is the
square, which is made when somebody first looks at it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


class Documents:
    """Documents of ``lengths`` tokens, end to end, in tensors on ``device``. It does not change.

    Attributes: ``lengths``; ``tokens``, their sum; ``longest``; ``equal``, the length that all of them have, or None;
    ``device``. What is a tensor is made when it is first asked for, without waiting for the device.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        """Raises ``ValueError`` where there are no documents, or one has no token."""
        self.lengths = tuple(int(length) for length in lengths)
        if not self.lengths or min(self.lengths) < 1:
            said = f"a length of {min(self.lengths)}" if self.lengths else "no lengths"
            raise ValueError(f"documents: {said}; expected one document or more, each of at least 1 token")
        self.tokens = sum(self.lengths)
        self.longest = max(self.lengths)
        self.equal = self.longest if self.longest == min(self.lengths) else None
        self.device = torch.empty(0, device=device).device
        self._squares: dict[Any, Tensor] = {}

    def __repr__(self) -> str:
        return f"Documents({list(self.lengths)}, device={str(self.device)!r})"

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each document begins, then the number of tokens: int32 (n + 1,)."""
        ends = torch.tensor(self.lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return self.placed(torch.cat([ends.new_zeros(1), ends]))

    @functools.cached_property
    def ids(self) -> Tensor:
        """The number of each token's document, int32 (T,)."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return self.placed(numbers.repeat_interleave(torch.tensor(self.lengths), output_size=self.tokens))

    def placed(self, host: Tensor) -> Tensor:
        """On the device: from pinned memory, so that the host goes on."""
        if self.device.type != "cuda":
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)

    def seen(self, window: int | None = None) -> Tensor:
        """Bool (1, 1, T, T): whether query i sees key j, of its own document, j <= i and, in a window, i - window < j.

        Made once for each window and kept.
        """
        if window is not None and window >= self.longest:
            window = None
        if window not in self._squares:
            at = torch.arange(self.tokens, device=self.device)
            square = (self.ids[:, None] == self.ids) & (at <= at[:, None])
            if window is not None:
                square &= at > at[:, None] - window
            self._squares[window] = square[None, None]
        return self._squares[window]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """``seen`` as numbers to add to scores, (1, 1, T, T): 0, or the dtype's least number. Made once and kept."""
        if dtype not in self._squares:
            square = torch.zeros(1, 1, self.tokens, self.tokens, dtype=dtype, device=self.device)
            self._squares[dtype] = square.masked_fill_(self.seen().logical_not(), torch.finfo(dtype).min)
        return self._squares[dtype]


class DocumentMask(Tensor):
    """The mask of ``documents``, bool (1, 1, T, T), without memory: True where query i may see key j.

    Its shape, dtype and device can be read for nothing. Whatever computes with it computes with ``dense()``, and gives
    ordinary tensors; but detached it is a mask of the same documents, and added to numbers, as transformers' eager
    attention adds masks to scores, it is their ``bias``: 0 where a key is seen.

    Left out: ``torch.compile`` of code that is given one.
    """

    documents: Documents

    @staticmethod
    def __new__(cls, documents: Documents) -> DocumentMask:
        shape = (1, 1, documents.tokens, documents.tokens)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=documents.device)
        self.documents = documents
        return self

    # Shapes, dtypes and devices are read without a detour through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DocumentMask({self.documents!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DocumentMask:
        return DocumentMask(self.documents)

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return DocumentMask, (self.documents,)

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor, made once for its documents."""
        return self.documents.seen()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return DocumentMask(args[0].documents)
        if func in (aten.add.Tensor, aten.add_.Tensor):
            args = _as_biases(args)
        return func(*tree_map(_written, args), **tree_map(_written, dict(kwargs or {})))


def _written(value: Any) -> Any:
    return value.dense() if isinstance(value, DocumentMask) else value


def _as_biases(terms: tuple[Any, ...]) -> tuple[Any, ...]:
    """The terms of a sum: masks that are added to floating scores as numbers of their dtype."""
    scores = next((t for t in terms if isinstance(t, Tensor) and t.is_floating_point()), None)
    if scores is None:
        return terms
    return tuple(t.documents.bias(scores.dtype) if isinstance(t, DocumentMask) else t for t in terms)


_KNOWN = WeakTensorKeyDictionary()
"""Positions -> their version and documents, as long as that tensor lives."""


def remember(position_ids: Tensor, lengths: Sequence[int]) -> Documents:
    """Say which documents ``position_ids`` (1, T) tell of, so that ``documents_of`` need not look at that tensor.

    Raises ``ValueError`` where the lengths do not add up to T.
    """
    _check_positions(position_ids)
    documents = Documents(lengths, position_ids.device)
    if documents.tokens != position_ids.shape[1]:
        raise ValueError(
            f"documents: lengths of {documents.tokens} tokens in all for position_ids {tuple(position_ids.shape)}; "
            "expected lengths that add up to its tokens"
        )
    _KNOWN[position_ids] = _version(position_ids), documents
    return documents


def documents_of(position_ids: Tensor) -> Documents:
    """The documents in a row of positions (1, T), integers: one begins wherever a position is not the last one plus 1.

    The same object for the same tensor while nobody writes to it. Positions that nobody told of (``remember``) are
    looked at once: on CUDA the host waits for them. Raises ``ValueError`` for other shapes, or no tokens.
    """
    version, documents = _KNOWN.get(position_ids) or (None, None)
    if documents is not None and version == _version(position_ids):
        return documents
    _check_positions(position_ids)
    row = position_ids.detach()[0]
    begins = (row[1:] != row[:-1] + 1).cpu().nonzero().flatten() + 1
    ends = [*begins.tolist(), row.shape[0]]
    return remember(position_ids, [end - begin for begin, end in zip([0, *ends], ends, strict=False)])


def _check_positions(position_ids: Tensor) -> None:
    if position_ids.ndim != 2 or position_ids.shape[0] != 1 or not position_ids.shape[1]:
        raise ValueError(
            f"documents: position_ids {tuple(position_ids.shape)}; expected (1, T), one row of at least 1 token"
        )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
