"""Role: a structural pattern of modules, as data, and the one generic forward that may replace theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ProbeShapes = Mapping[str, tuple[int, int]]
"""Child name -> (out_features, in_features) of the small ``nn.Linear`` that stands in for it in the probe."""


@dataclass(frozen=True)
class Role:
    """What a module must look like, and what it computes when it does.

    A module matches when its structure fits **and** a probe agrees: on small random inputs and randomised weights
    the module's own forward equals ``forward`` over the op's plain reference, to the bit, for one of the op's
    variants. No class names are compared, so an architecture nobody has heard of matches on the day it appears.

    Attributes:
        name: the role's name, such as ``rms_norm``.
        op: the op it runs on.
        forward: ``forward(module, op, variant, *inputs)``, the role's computation written over any such module;
            ``op`` is the op's function or, in the probe, its reference.
        probes: ``probes(module, randn)`` yields one or more tuples of positional inputs to compare on, each meant
            for one layout the op knows; ``randn(*shape)`` draws in the module's dtype. The module must take at
            least one of them.
        parameters: the module's own parameters and their number of dimensions, exactly these.
        children: alternative sets of children, one of which the module must have exactly; activations and other
            leaves without parameters do not count.
        attributes: groups of attribute names, of each of which the module must have one.
        global_functions: for roles that replace no forward but a function that the module's forward looks up among
            its module's globals, such as ``apply_rotary_pos_emb``: the names it goes by. ``forward`` then takes
            that function's arguments after ``module``, ``op`` and ``variant``.
    """

    name: str
    op: str
    forward: Callable[..., Any]
    probes: Callable[..., Any]
    parameters: Mapping[str, int] = field(default_factory=dict)
    children: tuple[ProbeShapes, ...] = ({},)
    attributes: tuple[tuple[str, ...], ...] = ()
    global_functions: tuple[str, ...] = ()
