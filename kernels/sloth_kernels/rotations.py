"""The rotary embeddings that models use, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Rotation:
    """How a model pairs elements, lays out its angles and casts.

    ``pairs``: "half" pairs element i with i + R / 2, "interleaved" 2i with 2i + 1, in input and output alike;
    "deinterleaved" reads the latter and writes the former. ``angles``: cos has one entry an "element", or a "pair" of
    R / 2 entries, or R of which the "first_half" serves the pairs. ``math``: products and sum in the dtype torch
    "promote"s to; the same and a "cast" back to q's; or "upcast" q to float32 first, and a cast back.
    ``clockwise`` turns by the negative angle.
    """

    pairs: str = "half"
    angles: str = "element"
    math: str = "promote"
    clockwise: bool = False


ROTATIONS: Mapping[str, Rotation] = MappingProxyType(
    {
        "half": Rotation(),  # Llama, Mistral, Qwen, Gemma, Granite; partial: Phi-3, GPT-NeoX
        "half_cast": Rotation(math="cast"),  # OLMo
        "half_upcast": Rotation(math="upcast"),  # ModernBERT decoder
        "half_clockwise": Rotation(clockwise=True),  # NanoChat
        "half_pair": Rotation(angles="pair"),  # gpt-oss
        "interleaved": Rotation("interleaved"),  # BLT
        "interleaved_upcast": Rotation("interleaved", math="upcast"),  # Cohere, Ernie 4.5 VL
        "interleaved_first_half": Rotation("interleaved", "first_half"),  # GLM 4, Helium
        "interleaved_first_half_upcast": Rotation("interleaved", "first_half", "upcast"),  # Ernie 4.5
        "interleaved_pair": Rotation("interleaved", "pair"),  # OpenAI privacy filter
        "deinterleaved_first_half": Rotation("deinterleaved", "first_half"),  # DeepSeek V3
    }
)
VARIANTS = tuple(ROTATIONS)
