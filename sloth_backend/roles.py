"""Role: a structural pattern of modules, as data, and the one generic forward that may replace theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Role:
    """What a module must look like, and what it computes when it does.

    A module matches when its structure fits **and** a probe agrees: on small random inputs and randomised weights
    the module's own forward equals ``forward`` over the op's plain reference, to the bit, for one of the op's
    variants. No class names are compared, so an architecture nobody has heard of matches on the day it appears.

    Attributes:
        name: the role's name, such as ``rms_norm``.
        op: the op it runs on.
        parameters: the module's own parameters and their number of dimensions, exactly these.
        children: alternative sets of child names, exactly one of which the module must have, with no others of
            its own; an ``activation`` child (one without parameters) is always allowed.
        forward: ``forward(module, op, variant, *inputs)``, the role's computation written over any such module;
            ``op`` is the op's function or its reference.
        inputs: ``inputs(module, randn)`` makes the probe's positional inputs; ``randn(*shape)`` draws in the
            module's dtype.
        global_function: instead of replacing the whole forward, replace this function that it looks up in its
            module's globals, such as ``apply_rotary_pos_emb``; ``forward`` then takes that function's arguments
            after ``module``, ``op`` and ``variant``.
        attributes: attribute name -> alternatives of which the module must have one.
    """

    name: str
    op: str
    forward: Callable[..., Any]
    inputs: Callable[..., tuple[Any, ...]]
    parameters: Mapping[str, int] = field(default_factory=dict)
    children: tuple[frozenset[str], ...] = (frozenset(),)
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    global_function: str | None = None
