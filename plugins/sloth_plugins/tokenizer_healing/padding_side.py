"""Fault: a model whose positions count padding is trained on rows that are padded on the left.

A causal language model numbers positions from the start of a row, padding included. With rotary or relative positions
only distances count, and the mask hides the padding: either side trains the same. Learned absolute positions shift with
the padding, so such a model sees every short row at positions of its own. In generation each model wants padding on the
left, where new tokens follow the last one; transformers sets positions from the mask there, and warns of right padding.
"""

from __future__ import annotations

from torch import nn

from sloth_backend.findings import Finding
from sloth_backend.phases import base_model
from sloth_backend.run import Run
from sloth_plugins.tokenizer_healing.case import Case, finding

SUBJECT = "tokenizer.padding_side"
LEARNED = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_embed")
"""What models call a table of positions."""
OWN_LOOP = ("user", "accelerate")
"""Hosts where the user's code pads, for whatever comes next."""


def heal(case: Case, model: nn.Module, run: Run) -> list[Finding]:
    """Axolotl pads as the tokenizer says and only trains: mended. TRL pads on its own; a loop of one's own is told."""
    asks = run.host == "axolotl" or run.host in OWN_LOOP
    table = learned_positions(base_model(model)) if asks and case.tokenizer.padding_side == "left" else None
    if table is None:
        return []
    reason = f"{table} learns a row for each position, and rows padded on the left start at another one each"
    if run.host in OWN_LOOP:
        advice = "set tokenizer.padding_side = 'right' for training, and 'left' again for generate()"
        return [finding("warned", SUBJECT, f"{reason}; {advice}")]
    case.edits.set(case.tokenizer, "padding_side", "right")
    return [finding("changed", SUBJECT, f"was 'left'; now 'right', as training needs it: {reason}")]


def learned_positions(model: nn.Module) -> str | None:
    """The name of the model's table of positions, None where it has none.

    Tables of a class of their own are left out: those of OPT and its like take positions from the mask.
    """
    return next(
        (name for name, part in model.named_modules() if type(part) is nn.Embedding and name.endswith(LEARNED)), None
    )
