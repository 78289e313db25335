"""Axolotl's configuration: the keys that switch the backend on, what they cannot be combined with, what they set.

``autoload`` calls ``patch_config`` with ``axolotl.cli.config`` once it is imported. Nothing else of ``sloth_backend``,
and nothing of Axolotl, is imported until a configuration asks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sloth_backend.config import SlothConfig

PLUGIN = "sloth_backend.hosts.axolotl.SlothPlugin"
SWITCHES = ("use_sloth", "use_unsloth")
OPTIONS = "sloth"

OWN_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Axolotl's own, which switch themselves on where all are unset; ours take their place."""

LOSS = "both compute the loss without keeping its logits"
COMPILE = "torch.compile cannot trace the forwards that ours run in"
OFFLOADING = "both move activations, on streams that know nothing of each other"
FIGHTS = {
    "chunked_cross_entropy": ("kernels", LOSS),
    "flash_attn_cross_entropy": ("kernels", LOSS),
    "tiled_mlp": ("kernels", "both replace the forwards of the MLPs"),
    "torch_compile": ("kernels", COMPILE),
    "torch_compile_regional": ("kernels", COMPILE),
    "use_kernels": ("kernels", "transformers sets its own kernels anew whenever the model turns to or from training"),
    "layer_offloading": ("kernels", "it takes the weights away that ours read"),
    "activation_offloading": ("checkpointing", OFFLOADING),
}
"""Key of Axolotl -> the option of ours that it cannot be combined with, and why."""
FIGHTING_PLUGINS = {
    "CutCrossEntropyPlugin": ("cut_cross_entropy", LOSS),
    "LigerPlugin": ("liger_", "both replace the forwards of the same modules"),
}
"""Plugin of Axolotl -> how its keys begin, and why it cannot be combined with ``kernels``."""
PEACE: dict[str, Any] = {"kernels": False, "checkpointing": "host"}
"""Option of ours -> the value with which it fights nothing."""

RATES = ("embedding_lr", "embedding_lr_scale")
"""Axolotl's own keys for a learning rate of the embeddings."""

_MARK = "_sloth_switch"


class Problem(NamedTuple):
    """One thing in a configuration that cannot be honoured: its key, its value, and what is wrong with the remedy."""

    key: str
    value: Any
    message: str


def patch_config(module: ModuleType) -> None:
    """Let ``module.prepare_plugins``, which every way into Axolotl calls, add our plugin where it is asked for.

    Raises:
        RuntimeError: there is no such function, or it takes no ``cfg``.
    """
    original = getattr(module, "prepare_plugins", None)
    if hasattr(original, _MARK):
        return
    if original is None or next(iter(inspect.signature(original).parameters), None) != "cfg":
        raise RuntimeError(f"{module.__name__} has no prepare_plugins(cfg); name {PLUGIN} under `plugins:` instead")

    @functools.wraps(original)
    def prepare_plugins(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if is_asked(cfg) and PLUGIN not in plugins_of(cfg):
            importlib.import_module(PLUGIN.rpartition(".")[0])  # Axolotl logs a plugin that fails and goes on without
            cfg["plugins"] = [*(cfg.get("plugins") or ()), PLUGIN]
        return original(cfg, *args, **kwargs)

    vars(prepare_plugins)[_MARK] = True
    vars(module)["prepare_plugins"] = prepare_plugins


def plugins_of(cfg: Mapping[str, Any]) -> list[str]:
    """The plugins that a configuration names, each as ``module.Class``."""
    return [str(name).replace(":", ".") for name in cfg.get("plugins") or ()]


def is_asked(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration, raw or validated, switches the backend on: by a switch, by options, or by the plugin.

    A switch that says false keeps it off, whatever the others say that is not a switch.
    """
    said = [cfg.get(name) for name in SWITCHES if cfg.get(name) is not None]
    if said:
        return any(said)
    options = cfg.get(OPTIONS)
    return PLUGIN in plugins_of(cfg) if options is None else options is not False


def options_of(cfg: Mapping[str, Any]) -> SlothConfig:
    """The options that a configuration gives under ``sloth``.

    Raises:
        SlothConfigError: an option is unknown, or a value does not fit.
    """
    from sloth_backend.config import SlothConfig

    options = cfg.get(OPTIONS)
    return SlothConfig.from_mapping(dict(options)) if isinstance(options, Mapping) else SlothConfig()


def problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """Everything in a raw configuration that cannot be honoured."""
    from sloth_backend.config import SlothConfigError

    found = list(_misspoken(cfg))
    try:
        config = options_of(cfg)
    except SlothConfigError as error:
        return found + [Problem(OPTIONS, cfg.get(OPTIONS), text) for text in error.problems]
    return [*found, *_fights(cfg, config)]


def _misspoken(cfg: Mapping[str, Any]) -> Iterator[Problem]:
    """Values of the wrong kind, switches that contradict each other, and keys of an integration that is gone."""
    said = {name: cfg.get(name) for name in SWITCHES if cfg.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, bool):
            yield Problem(name, value, f"expected true or false; options go under `{OPTIONS}:`")
    if len({bool(value) for value in said.values()}) > 1:
        yield Problem("use_unsloth", said["use_unsloth"], "contradicts `use_sloth`, its twin; give one of them")
    options = cfg.get(OPTIONS)
    if options is not None and not isinstance(options, (bool, Mapping)):
        yield Problem(OPTIONS, options, "expected a mapping of options, such as `sloth: {kernels: [rope, glu]}`")
    for key in sorted(key for key in cfg if str(key).startswith("unsloth_") and cfg.get(key)):
        yield Problem(key, cfg.get(key), f"Axolotl has removed this key; remove it, {_switch(cfg)} does what it did")


def _fights(cfg: Mapping[str, Any], config: SlothConfig) -> Iterator[Problem]:
    """Keys and plugins of Axolotl that cannot be combined with ``config``."""
    asked = {key: fight for key, fight in FIGHTS.items() if cfg.get(key)}
    if str(cfg.get("gradient_checkpointing")).startswith("offload"):
        asked["gradient_checkpointing"] = ("checkpointing", OFFLOADING)
    for key, (ours, why) in asked.items():
        if getattr(config, ours) not in (PEACE[ours], ()):
            remedy = "Set it to true" if key == "gradient_checkpointing" else f"Remove `{key}`"
            yield Problem(key, cfg.get(key), _fight(cfg, config, ours, why, remedy))
    for key in RATES if config.embedding_learning_rate is not None else ():
        if cfg.get(key) is not None:
            text = f"both set the learning rate of the embeddings. Remove `{key}`, or embedding_learning_rate"
            yield Problem(key, cfg.get(key), f"{text} under `{OPTIONS}:`")
    for plugin, (prefix, why) in FIGHTING_PLUGINS.items() if config.kernels else ():
        named = [name for name in plugins_of(cfg) if name.rpartition(".")[2] == plugin]
        for key in sorted(key for key in cfg if str(key).startswith(prefix) and cfg.get(key)):
            yield Problem(key, cfg.get(key), _fight(cfg, config, "kernels", why, f"Remove `{key}`"))
        for name in named:
            yield Problem("plugins", name, _fight(cfg, config, "kernels", why, f"Remove {name} from `plugins`"))


def _fight(cfg: Mapping[str, Any], config: SlothConfig, ours: str, why: str, remedy: str) -> str:
    value, peace = (str(x).lower() if isinstance(x, bool) else x for x in (getattr(config, ours), PEACE[ours]))
    own = "" if isinstance(getattr(config, ours), tuple) else f" ({ours}: {value})"
    return f"cannot be combined with {_switch(cfg)}{own}: {why}. {remedy}, or set `{OPTIONS}: {{{ours}: {peace}}}`"


def _switch(cfg: Mapping[str, Any]) -> str:
    """What switched the backend on, as the user wrote it."""
    name = next((name for name in SWITCHES if cfg.get(name)), None)
    return f"`{name}: true`" if name else f"`{OPTIONS}`" if cfg.get(OPTIONS) else "SlothPlugin"


def prepare(cfg: Any) -> list[str]:
    """Set in a raw configuration what the backend needs, before Axolotl validates it; what was set, in words."""
    said = []
    if cfg.get("gradient_checkpointing") == "unsloth":
        cfg["gradient_checkpointing"] = True
        said.append("gradient_checkpointing: unsloth is taken as true")
    if options_of(cfg).kernels:
        said += [f"{key} is switched off: the kernels of sloth_backend do that" for key in OWN_LORA_KERNELS if cfg[key]]
        cfg.update(dict.fromkeys(OWN_LORA_KERNELS, False))
    return said
