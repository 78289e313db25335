"""The keyword and the configuration field that classes of a host get in place, as if their author had added them.

Nothing of ``sloth_backend`` is imported until a switch is on: this runs in every process that imports the host.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
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
    """Give TrainingArguments (``cls``) the field ``backend``, declared last; twice is harmless.

    ``dataclasses`` itself writes the methods, so command line parsers, ``fields``, ``replace``, ``repr`` and
    dataclasses derived from ``cls`` see a field like the others; those that were derived before get it too. The field
    keeps its value as plain data, so that a pickled or dumped configuration can be read without this package.

    Raises:
        RuntimeError: the class has a field of this name already, or an ``__init__`` that ``dataclasses`` did not write.
    """
    if not is_ours(cls):
        if SWITCH in cls.__dataclass_fields__:
            raise RuntimeError(f"{cls.__name__} has a field named {SWITCH!r} of its own")
        if not _is_generated(cls, "__init__"):
            raise RuntimeError(f"{cls.__name__} has an __init__ that dataclasses did not write")
        _declare(cls)
        cls.__post_init__ = _plain_first(cls.__post_init__)
        setattr(cls, SWITCH, None)  # what a configuration pickled without the field answers
    for derived in list(_derived(cls)):
        if SWITCH not in derived.__dataclass_fields__:
            _declare(derived)


def is_ours(cls: Any) -> bool:
    """Whether the field ``backend`` of a dataclass is the switch, not one that its author gave another meaning."""
    field = getattr(cls, "__dataclass_fields__", {}).get(SWITCH)
    return field is not None and field.metadata.get("help") == HELP


def _derived(cls: type) -> Iterator[Any]:
    """The dataclasses derived from ``cls``, each after those that it is derived from."""
    for derived in cls.__subclasses__():
        if "__dataclass_fields__" in vars(derived):
            yield derived
        yield from _derived(derived)


def _declare(cls: Any) -> None:
    """Add the field to one dataclass, as if it stood in its body."""
    kind = dict[str, Any] | str | None
    # By keyword alone: the places of the arguments of derived classes stay what they are.
    field = dataclasses.field(default=None, metadata={"help": HELP}, kw_only=True)
    names = {"__module__": cls.__module__, "__annotations__": {SWITCH: kind}, SWITCH: field}
    twin: Any = dataclasses.dataclass(type(cls.__name__, (cls,), names))
    cls.__dataclass_fields__[SWITCH] = twin.__dataclass_fields__[SWITCH]
    cls.__annotations__[SWITCH] = kind
    if SWITCH not in cls._VALID_DICT_FIELDS:
        cls._VALID_DICT_FIELDS = [*cls._VALID_DICT_FIELDS, SWITCH]  # JSON given as a string is read in __post_init__
    for name in filter(functools.partial(_is_generated, cls), ("__init__", "__repr__", "__eq__")):
        setattr(cls, name, getattr(twin, name))


def _plain_first(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``__post_init__`` that turns the field's value into plain data first."""

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if is_ours(type(self)):
            setattr(self, SWITCH, _plain(getattr(self, SWITCH)))
        original(self)

    return __post_init__


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
        call = _bound(signature, self, args, kwargs)
        if call is None or _MARK in vars(self):  # the class derived from this one has seen to it
            original(self, *args, **kwargs)
            return
        config = _resolve(cls, backend, call.arguments.get("args")) or _from_environment(backend, call)
        setattr(self, _MARK, config)
        try:
            original(self, *args, **kwargs) if config is None else construct(self, original, call, config)
        finally:
            delattr(self, _MARK)
        if backend is False or _field(call.arguments.get("args")) is False:
            _decline(self)

    switch = inspect.Parameter(SWITCH, inspect.Parameter.KEYWORD_ONLY, default=None)
    shown = signature.replace(parameters=[*signature.parameters.values(), switch])
    vars(__init__).update({"__signature__": shown, _MARK: True})
    cls.__init__ = __init__


def _bound(
    signature: inspect.Signature, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments | None:
    """The arguments by name; None for a call that the original is about to refuse."""
    try:
        return signature.bind(trainer, *args, **kwargs)
    except TypeError:
        return None


def _resolve(cls: type, keyword: Any, args: Any) -> SlothConfig | None:
    """The options asked for by the trainer's keyword or the field of ``args``; ``backend=False`` overrules the field.

    Raises:
        SlothConfigError: both are given and differ, or one is not understood.
    """
    field = _field(args)
    if keyword is False or (_is_off(keyword) and _is_off(field)):
        return None
    from sloth_backend.config import SlothConfig, SlothConfigError

    asked, declared = SlothConfig.parse(keyword), SlothConfig.parse(field)
    if asked and declared and asked != declared:
        names = f"{cls.__name__}(backend={keyword!r}) and {type(args).__name__}(backend={field!r})"
        raise SlothConfigError([f"{names} differ: give the options in one of the two places"])
    if declared:
        setattr(args, SWITCH, _plain(field))
    return asked or declared


def _field(args: Any) -> Any:
    return getattr(args, SWITCH, None) if is_ours(type(args)) else None


def _from_environment(keyword: Any, call: inspect.BoundArguments) -> SlothConfig | None:
    """What ``SLOTH_BACKEND`` asks for, where the script says nothing and no other switch has served the model."""
    from sloth_backend.hosts.environment import from_environment, is_asked

    model: Any = call.arguments.get("model")
    if keyword is not None or not is_asked() or _field(call.arguments.get("args")) is not None:
        return None
    if hasattr(model, "modules"):
        from sloth_backend.phases import find_session

        if find_session(model) is not None:
            return None
    return from_environment()


def _decline(trainer: Any) -> None:
    """Have the adapter of Accelerate leave alone what this trainer will prepare."""
    from sloth_backend.hosts.environment import DECLINED

    if hasattr(trainer, "accelerator"):
        setattr(trainer.accelerator, DECLINED, True)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value
