"""A layer whose programs were run once, to see how large their values are; and what a pass looks like to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sloth_kernels.adapters import autocast_dtype
from sloth_kernels.documents import DocumentMask
from sloth_kernels.program import Program
from sloth_plugins.layer_programs.assemble import LayerProgram
from sloth_plugins.layer_programs.costs import Estimate, Shape, parkable, widths


class Layer:
    """A layer's programs, the bytes a token of their values, and those of the weights that can be cached for it.

    Args:
        made: its programs.
        x: an input of a few tokens (B, S, H); the program is run on it, under the autocast that is on.
        constants: those that go with it.
    """

    def __init__(self, made: LayerProgram, x: torch.Tensor, constants: Mapping[str, Any]) -> None:
        values = made.program.trace(x, constants)
        self.made, self.x, self.constants = made, x, constants
        self.programs = {0: made.program, **made.tiled}
        self.widths, self.parkable, self.dense_bytes = widths(values, x), parkable(values), made.dense_bytes()
        self.gradient_bytes = sum(operand.nbytes for operand in made.program.trained())
        self.key = (made.program.forms, tuple(sorted(self.widths.items())), self.dense_bytes, self.gradient_bytes)

    def traced_again(self, device: torch.device) -> Layer:
        """The same layer as it is now, on ``device``."""
        constants = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.constants.items()}
        return Layer(self.made, self.x.to(device), constants)

    def estimates(self, shape: Shape) -> list[Estimate]:
        """What its programs cost in a pass of ``shape``; those whose tiles would be longer than it are left out."""
        fitting = [program for rows, program in self.programs.items() if rows < shape.tokens]
        return [self.estimate(program, shape) for program in fitting]

    def estimate(self, program: Program, shape: Shape) -> Estimate:
        """What one of its programs costs."""
        return Estimate(program, self.widths, shape, self.parkable, self.gradient_bytes)


def shape_of(x: torch.Tensor, mask: torch.Tensor | None, alone: bool = False) -> Shape:
    """Of a pass with the input x (B, S, H). That of documents, which differ from pass to pass, is rounded up."""
    autocast = autocast_dtype(x)
    if isinstance(mask, DocumentMask):
        return documents_shape(mask.documents.tokens, mask.documents.longest, autocast, alone)
    return Shape(x.shape[:-1].numel(), x.shape[-2], autocast, alone)


def documents_shape(tokens: int, longest: int, autocast: torch.dtype | None, alone: bool = False) -> Shape:
    """Of a pass of documents, its tokens at most an eighth too many where they are many: few shapes, few plans."""
    step = max(256, 1 << tokens.bit_length() >> 4)
    tokens = -(-tokens // step) * step
    return Shape(tokens, min(tokens, 1 << (longest - 1).bit_length()), autocast, alone)
