"""Run: the frozen facts of one training set-up, the same for every plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sloth_backend.config import SlothConfig

if TYPE_CHECKING:
    import torch
    from torch import nn


BY_MODULE = "zero-3"
"""Sharding that gathers parameters module by module."""
REASON_BY_MODULE = "ZeRO-3 gathers a module's parameters for its own call alone; FSDP2 gathers those of a whole layer"


@dataclass(frozen=True)
class Run:
    """Who asked, for what, on what.

    Attributes:
        host: ``"trl"``, ``"transformers"``, ``"axolotl"``, ``"accelerate"`` or ``"user"`` (``sloth_backend.optimize``).
        config: the options.
        device: where the model's first parameter lives; None while there is no model.
        dtype: the dtype of the model's floating weights (of its norms where the linears are quantised).
        quantization: ``"bnb-4bit"``, ``"bnb-8bit"``, another method's name, or None.
        tokens_per_pass: the most tokens, rows x length, that one forward and backward sees; None where the host does
            not say.
        optimizer_bytes: what the optimizer keeps for each trained parameter, in bytes.
        sharding: how the model will be spread over processes: ``"fsdp2"``, ``"zero-1"`` to ``"zero-3"``; None where
            each of them holds all of it, or where the host does not say.
        gathers_as: the dtype that FSDP2 casts parameters to when it gathers them; None where it leaves them theirs.
        moves_to: where the host will move the model once it is patched; None where it is there already.
        gradient_checkpointing: whether the host will checkpoint layers; None where only the model will tell.
        problems: combinations the host adapter found that cannot work; reported with those of the plugins.
    """

    host: str
    config: SlothConfig
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    quantization: str | None = None
    gradient_checkpointing: bool | None = None
    tokens_per_pass: int | None = None
    optimizer_bytes: float = 8.0
    sharding: str | None = None
    gathers_as: torch.dtype | None = None
    moves_to: torch.device | None = None
    problems: tuple[str, ...] = field(default=(), repr=False)

    def describe(self) -> str:
        """``trl, cuda:0, bfloat16, bnb-4bit``: the run in a few words."""
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else None
        return ", ".join(str(part) for part in (self.host, self.device, dtype, self.quantization) if part)


def describe_model(model: nn.Module) -> dict[str, object]:
    """The facts of a Run that a model knows: ``device``, ``dtype`` and ``quantization``."""
    tensors = list(model.parameters())
    floating = [t for t in tensors if t.is_floating_point()]
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    return {
        "device": tensors[0].device if tensors else None,
        "dtype": floating[0].dtype if floating else None,
        "quantization": _quantization_name(quantization),
    }


def find_embedding(model: Any, which: Literal["input", "output"]) -> nn.Module | None:
    """What ``get_input_embeddings`` or ``get_output_embeddings`` returns; None where a model has no such method,
    cannot answer, or answers that there is none."""
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def is_causal_lm(model: object) -> bool:
    """Whether it predicts the next token: it has output embeddings and is no encoder-decoder."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return find_embedding(model, "output") is not None and not encodes


def _quantization_name(config: object | None) -> str | None:
    if config is None:
        return None
    values = config if isinstance(config, dict) else vars(config)
    for bits in ("4bit", "8bit"):
        if values.get(f"load_in_{bits}") or values.get(f"_load_in_{bits}"):
            return f"bnb-{bits}"
    return str(values.get("quant_method", "unknown"))
