"""The keyword and the configuration field that classes of a host get in place, as if their author had added them.

Nothing of ``sloth_backend`` is imported until a switch is on: this runs in every process that imports the host.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sloth_backend.config import SlothConfig

SWITCH = "backend"
HELP = (
    "Optimised training backend: 'sloth' switches it on with its default options, a mapping (JSON on the command "
    "line) gives options by name, see sloth_backend.SlothConfig. None leaves training as it is."
)
Construct = Callable[[Any, Callable[..., None], inspect.BoundArguments, "SlothConfig"], None]
"""``construct(self, original_init, call, config)``: what a switched-on ``__init__`` does instead."""

_MARK = "_sloth_switch"


def add_field(cls: Any) -> None:
    """Give a dataclass derived from TrainingArguments the field ``backend``, declared last; twice is harmless.

    ``dataclasses`` itself writes the methods, so command line parsers, ``fields``, ``replace``, ``repr`` and
    dataclasses derived from ``cls`` see a field like the others. ``__init__`` keeps its value as plain data, so that
    a pickled or dumped configuration can be read without this package.

    Raises:
        RuntimeError: the class has a field of this name already.
    """
    if hasattr(cls.__init__, _MARK):
        return
    if SWITCH in cls.__dataclass_fields__:
        raise RuntimeError(f"{cls.__name__} has a field named {SWITCH!r} of its own")
    kind = dict[str, Any] | str | None
    field = dataclasses.field(default=None, metadata={"help": HELP})
    names = {"__module__": cls.__module__, "__annotations__": {SWITCH: kind}, SWITCH: field}
    twin: Any = dataclasses.dataclass(type(cls.__name__, (cls,), names))
    generated = twin.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if SWITCH in kwargs:
            kwargs[SWITCH] = _plain(kwargs[SWITCH])
        generated(self, *args, **kwargs)

    cls.__dataclass_fields__[SWITCH] = twin.__dataclass_fields__[SWITCH]
    cls.__annotations__[SWITCH] = kind
    cls._VALID_DICT_FIELDS = [*cls._VALID_DICT_FIELDS, SWITCH]  # JSON given as a string is read in __post_init__
    setattr(cls, SWITCH, None)  # what a configuration pickled without the field answers
    for name in filter(functools.partial(_is_generated, cls), ("__repr__", "__eq__")):
        setattr(cls, name, getattr(twin, name))
    vars(__init__)[_MARK] = True
    cls.__init__ = __init__


def _is_generated(cls: type, name: str) -> bool:
    """Whether ``cls`` has this method from ``dataclasses``, which compiles it from a string."""
    function = inspect.unwrap(vars(cls).get(name, _is_generated))
    return function.__code__.co_filename == "<string>"


def add_keyword(cls: Any, needs: set[str], construct: Construct) -> None:
    """Let ``cls.__init__`` take the keyword ``backend``, in place, so that subclasses have it; twice is harmless.

    Where neither the keyword nor ``args.backend`` switches the backend on, the original runs as it was called.

    Raises:
        RuntimeError: the original takes no argument of a name in ``needs``, or one named ``backend``.
    """
    original = cls.__init__
    if hasattr(original, _MARK):
        return
    signature = inspect.signature(original)
    if SWITCH in signature.parameters or not needs <= signature.parameters.keys():
        raise RuntimeError(f"the signature of {cls.__name__} is not one that this adapter knows: {signature}")

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, backend: Any = None, **kwargs: Any) -> None:
        try:
            call = signature.bind(self, *args, **kwargs)
        except TypeError:
            return original(self, *args, **kwargs)
        config = _resolve(cls, backend, call.arguments.get("args"))
        if config is None or _MARK in vars(self):
            return original(self, *args, **kwargs)
        setattr(self, _MARK, config)
        try:
            return construct(self, original, call, config)
        finally:
            delattr(self, _MARK)

    switch = inspect.Parameter(SWITCH, inspect.Parameter.KEYWORD_ONLY, default=None)
    shown = signature.replace(parameters=[*signature.parameters.values(), switch])
    vars(__init__).update({"__signature__": shown, _MARK: True})
    cls.__init__ = __init__


def _resolve(cls: type, keyword: Any, args: Any) -> SlothConfig | None:
    """The options asked for by the trainer's keyword or the field of ``args``; ``backend=False`` overrules the field.

    Raises:
        SlothConfigError: both are given and differ, or one is not understood.
    """
    field = getattr(args, SWITCH, None)
    if keyword is False or (_is_off(keyword) and _is_off(field)):
        return None
    from sloth_backend.config import SlothConfig, SlothConfigError

    asked, declared = SlothConfig.parse(keyword), SlothConfig.parse(field)
    if asked and declared and asked != declared:
        names = f"{cls.__name__}(backend={keyword!r}) and {type(args).__name__}(backend={field!r})"
        raise SlothConfigError([f"{names} differ: give the options in one of the two places"])
    if declared:
        args.backend = _plain(field)
    return asked or declared


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value
