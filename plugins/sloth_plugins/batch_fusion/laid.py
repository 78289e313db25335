"""The micro-batches of a step laid end to end: what there is to make of a step before it is known how it will pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch

from sloth_kernels.documents import remember
from sloth_plugins.batch_fusion.rows import Rows, divided, joined, positions


class Pass(NamedTuple):
    """What the model is called with once, and what that is of micro-batches."""

    inputs: dict[str, torch.Tensor]
    rows: Rows


@dataclass(frozen=True)
class Laid:
    """Micro-batches as rows; without ``parts`` they could not be taken apart.

    Attributes:
        batches: the micro-batches.
        parts: each of them as rows, which is one way for them to pass.
        ways: others, by the number of passes that was asked for.
        inputs: of all passes, whichever way it is, end to end: (T,) each, on the host.
    """

    batches: Sequence[Mapping[str, Any]]
    parts: list[Rows] = field(default_factory=list)
    ways: dict[int, list[Rows]] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Any]], parts: list[Rows], device: torch.device) -> Laid:
        """``batches`` that are ``parts``, made ready for being sent to ``device``."""
        rows = joined(parts)
        at = positions(rows.lengths, rows.input_ids.device)
        inputs = {"input_ids": rows.input_ids, "labels": rows.labels, "position_ids": at}
        ways = {n: divided(rows, n) for n in range(1, len(parts) + 1)}
        return cls(batches, parts, ways, {name: _ready(value, device) for name, value in inputs.items()})

    @property
    def largest(self) -> int:
        """The tokens of the largest micro-batch, padding included."""
        return max((part.padded for part in self.parts), default=0)

    def is_of(self, batches: Sequence[Any]) -> bool:
        """Whether it is these very objects that were laid."""
        return len(batches) == len(self.batches) and all(map(is_, batches, self.batches))

    def sent(self, way: Sequence[Rows], device: torch.device) -> list[Pass]:
        """The passes that the rows of ``way`` are, each one row of all of its tokens, sent without waiting."""
        cuts = [rows.tokens for rows in way]
        pieces = zip(*(value.split(cuts) for value in self.inputs.values()), strict=True)
        hosts = [dict(zip(self.inputs, tensors, strict=True)) for tensors in pieces]
        return [_sent(host, rows, device) for host, rows in zip(hosts, way, strict=True)]


def _sent(host: Mapping[str, torch.Tensor], rows: Rows, device: torch.device) -> Pass:
    inputs = {name: value[None].to(device, non_blocking=True) for name, value in host.items()}
    remember(inputs["position_ids"], rows.lengths)
    return Pass(inputs, rows)


def _ready(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """In memory from which it is sent without waiting."""
    return value.pin_memory() if torch.device(device).type == "cuda" and value.device.type == "cpu" else value
