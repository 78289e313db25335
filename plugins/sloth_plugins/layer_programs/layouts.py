"""How decoder layers are put together: names of children and what they mean, as data.

Nothing here is believed: a program built from it counts only if it computes what the layer itself computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where a layer normalises: child names, None where it does not.

    ``parallel``: both branches read the layer's input; otherwise the MLP reads the attention's result.
    """

    attention_in: str | None = None
    attention_out: str | None = None
    mlp_in: str | None = None
    mlp_out: str | None = None
    parallel: bool = False

    @property
    def norms(self) -> frozenset[str]:
        """The children it names."""
        names = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        return frozenset(name for name in names if name is not None)


LAYOUTS = (
    Layout(attention_in="input_layernorm", mlp_in="post_attention_layernorm"),
    Layout(
        attention_in="input_layernorm",
        attention_out="post_attention_layernorm",
        mlp_in="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
    Layout(
        attention_in="input_layernorm",
        attention_out="post_self_attn_layernorm",
        mlp_in="post_attention_layernorm",
        mlp_out="post_mlp_layernorm",
    ),
    Layout(attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"),
    Layout(attention_in="input_layernorm", mlp_in="input_layernorm", parallel=True),
    Layout(attention_in="attention_norm", mlp_in="ffn_norm"),
    Layout(attention_in="pre_attention_layernorm", mlp_in="pre_mlp_layernorm"),
)
"""Pre-norm (Llama, Mistral, Qwen, Phi-3, Granite), norms around both branches (Gemma 2 and 3; GLM-4), after them
(OLMo 2, EXAONE 4), one norm for parallel branches (Cohere's kind), and other names for pre-norm."""

SEPARATE, FUSED = ("q_proj", "k_proj", "v_proj"), "qkv_proj"
OUTPUTS = ("o_proj", "dense", "out_proj")
HEAD_NORMS: tuple[tuple[str, str], ...] = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
RESIDUAL_SCALES = ("residual_multiplier",)
SOFTCAPS = ("attn_logit_softcapping",)

USED = ("attention_mask", "position_embeddings")
"""Arguments of a layer's forward that a program reads."""
BOUNDARIES = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""Where documents begin, which their positions say already."""
OF_NO_EFFECT = frozenset({"position_ids", "cache_position", "num_items_in_batch", "logits_to_keep", *BOUNDARIES})
"""Those that say nothing to attention by sdpa or eager once the two above are there."""
FALSY = frozenset({"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"})
"""Those that may be there but not ask for anything."""


def effect_free(kwargs: Mapping[str, object]) -> bool:
    """Whether none of the arguments but ``USED`` has an effect on what a layer computes."""
    return all(
        value is None or name in USED or name in OF_NO_EFFECT or (name in FALSY and not value)
        for name, value in kwargs.items()
    )
