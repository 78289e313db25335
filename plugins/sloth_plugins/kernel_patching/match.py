"""Does a module play a role? Structure first, then a numeric probe that decides to the bit.

The probe works on a small stand-in: an object of the module's own class whose linears are tiny and random, so that
it costs nothing beside a model and never touches a weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sloth_backend.roles import ProbeShapes, Role
from sloth_kernels.op import Op
from sloth_plugins.kernel_patching.modules import HOOKS

PROBE_SEED = 20240418
_SCALARS = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Match:
    """The variant of its op that a module computes, or why none does."""

    variant: str | None = None
    reason: str = ""


@dataclass
class Matcher:
    """Matches modules against roles; modules that cannot differ in the probe share one probe."""

    dtype: torch.dtype
    _probed: dict[Any, Match] = field(default_factory=dict)

    def match(self, module: nn.Module, role: Role, op: Op) -> Match | None:
        """None where the module does not resemble the role at all; else a Match, with its reason if it fails."""
        misfit = structure(module, role)
        if misfit is not None:
            return Match(reason=misfit) if misfit else None
        key = (role.name, *_signature(module))
        if key not in self._probed:
            self._probed[key] = _probe(module, role, op, self.dtype)
        return self._probed[key]


def structure(module: nn.Module, role: Role) -> str | None:
    """None if the structure fits, else what does not; the empty string where it bears no resemblance."""
    if role.global_functions:
        return None if global_function(module, role) else _foreign_function(module, role)
    own = {name: len(_shape(p)) for name, p in module._parameters.items() if p is not None}
    children = set(dict(_bearing_children(module)))
    if own != role.parameters or children not in [set(shapes) for shapes in role.children]:
        return _resemblance(role, own, children)
    if not own and not children:
        return ""
    missing = [group for group in role.attributes if not any(name in vars(module) for name in group)]
    if missing:
        return f"has none of the attributes {', '.join(missing[0])}"
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(inputs) != inputs_of(role.forward):
        return f"its forward takes ({', '.join(inputs)})"
    return None


def global_function(module: nn.Module, role: Role) -> str | None:
    """The name of the role's function that the module's class looks up among its module's globals, if it does."""
    forward = type(module).forward
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return next((n for n in role.global_functions if code and n in code.co_names and callable(names.get(n))), None)


def _foreign_function(module: nn.Module, role: Role) -> str:
    """A sentence for forwards that call a function of the same kind under a name the role does not know."""
    stem = role.global_functions[0].split("_pos")[0]
    code = getattr(type(module).forward, "__code__", None)
    other = next((name for name in getattr(code, "co_names", ()) if name.startswith(stem)), None)
    return f"calls {other}; {role.name} knows {', '.join(role.global_functions)}" if other else ""


def _bearing_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children that hold parameters, or children of their own: all that are more than an activation."""
    for name, child in module._modules.items():
        if child is not None and (child._modules or any(True for _ in child.parameters(recurse=False))):
            yield name, child


def _resemblance(role: Role, own: dict[str, int], children: set[str]) -> str:
    """A sentence for modules close to the role: same kind of parameters and more, or most of the children."""
    if role.parameters and not children and own.items() > dict(role.parameters).items():
        return f"has the parameters {', '.join(own)}; {role.name} has {', '.join(role.parameters)} alone"
    for shapes in filter(None, role.children):
        if len(children & set(shapes)) >= 2:
            return f"has the children {', '.join(sorted(children))}; {role.name} has {', '.join(shapes)}"
    return ""


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What a probe's outcome can depend on: class, plain attributes, dtypes, activations and kinds of children."""
    scalars = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, _SCALARS) and not name.startswith("_") and name not in ("layer_idx", "training")
    )
    own = tuple((name, p.dtype, len(_shape(p))) for name, p in module._parameters.items() if p is not None)
    children = tuple((name, _kind(child)) for name, child in module._modules.items() if child is not None)
    return type(module), scalars, own, children


def _kind(child: nn.Module) -> str:
    bears = any(True for _ in child.parameters())
    return f"linear bias={getattr(child, 'bias', None) is not None}" if bears else repr(child)


def _probe(module: nn.Module, role: Role, op: Op, dtype: torch.dtype) -> Match:
    """The first variant that agrees in the run's dtype and in bfloat16.

    Two variants that differ only in where they cast look alike in float32, yet autocast will hand a float32 model
    bfloat16 activations: bfloat16 tells them apart.
    """
    candidates = list(op.variants)
    for probe_dtype in dict.fromkeys((dtype, torch.bfloat16)):
        outcome = _agreeing(module, role, op, candidates, _generator(probe_dtype))
        if isinstance(outcome, str):
            return Match(reason=outcome)
        candidates = outcome
    return Match(variant=candidates[0])


def _agreeing(
    module: nn.Module, role: Role, op: Op, variants: list[str], randn: Callable[..., torch.Tensor]
) -> list[str] | str:
    """The variants whose reference equals the module's own computation on every probe it takes, or why none does."""
    try:
        theirs = _own_computation(module, role, randn)
    except Exception as error:
        return f"no stand-in of {type(module).__name__} could be made: {error}"
    outcomes = [(inputs, _attempt(theirs.call, inputs)) for inputs in role.probes(theirs.module, randn)]
    taken = [(inputs, output) for inputs, output in outcomes if not isinstance(output, Exception)]
    if not taken:
        return f"the probe's inputs do not fit its forward: {outcomes[0][1]}"

    def agrees(variant: str) -> bool:
        call = (theirs.module, op.reference, variant)
        return all(_same(_attempt(role.forward, (*call, *inputs)), output) for inputs, output in taken)

    return [v for v in variants if agrees(v)] or f"computes something else than {role.name} ({', '.join(op.variants)})"


@dataclass(frozen=True)
class _Theirs:
    module: nn.Module
    call: Callable[..., Any]


def _own_computation(module: nn.Module, role: Role, randn: Callable[..., torch.Tensor]) -> _Theirs:
    if role.global_functions:
        name = str(global_function(module, role))
        return _Theirs(module, type(module).forward.__globals__[name])
    stand_in = _stand_in(module, role, randn)
    return _Theirs(stand_in, stand_in.forward)


def _stand_in(module: nn.Module, role: Role, randn: Callable[..., torch.Tensor]) -> nn.Module:
    """An object of the same class and attributes on the CPU, with random parameters and tiny linears for children."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).pop("forward", None)
    vars(twin).update(
        _parameters={n: None if p is None else _random_like(p, randn) for n, p in module._parameters.items()},
        _modules=_tiny_children(module, role, randn),
        training=True,
    )
    for table in HOOKS:
        vars(twin)[table] = type(vars(module)[table])()
    return twin


def _random_like(p: torch.Tensor, randn: Callable[..., torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(randn(*_shape(p)).to(p.dtype), requires_grad=False)


def _shape(p: torch.Tensor) -> torch.Size:
    """That of the whole parameter: where ZeRO-3 has partitioned it, its own is empty."""
    return getattr(p, "ds_shape", p.shape)


def _tiny_children(module: nn.Module, role: Role, randn: Callable[..., torch.Tensor]) -> dict[str, nn.Module | None]:
    bearing = dict(_bearing_children(module))
    shapes: ProbeShapes = next((s for s in role.children if set(s) == set(bearing)), {})
    children: dict[str, nn.Module | None] = dict(module._modules)
    for name, (rows, columns) in shapes.items():
        bias = getattr(bearing[name], "bias", None) is not None
        # On the meta device nothing is drawn from torch's global generator: the run's own randomness stays as it is.
        linear = nn.Linear(columns, rows, bias=bias, device="meta")
        for key, parameter in list(linear.named_parameters()):
            setattr(linear, key, nn.Parameter(randn(*parameter.shape), requires_grad=False))
        children[name] = linear
    return children


def _generator(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    source = torch.Generator().manual_seed(PROBE_SEED)
    return lambda *shape: torch.randn(*shape, generator=source).to(dtype)


def _attempt(call: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """The call's result on the CPU, or the exception it raised."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return call(*inputs)
    except Exception as error:
        return error


def _same(mine: Any, theirs: Any) -> bool:
    """Equal dtype, shape and bits, tensor by tensor; NaN equals nothing."""
    if isinstance(mine, Exception):
        return False
    pairs = zip(_tensors(mine), _tensors(theirs), strict=False)
    return len(_tensors(mine)) == len(_tensors(theirs)) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def inputs_of(forward: Callable[..., Any]) -> int:
    """How many positional inputs a role's forward takes after ``module``, ``op`` and ``variant``."""
    return len(inspect.signature(forward).parameters) - 3
