"""Whether a model's labels are next tokens: what passing rows together, and cutting their first labels, stands on."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.loss.loss_utils import ForCausalLMLoss

from sloth_backend.run import find_embedding
from sloth_plugins.kernel_patching.loss import calls_loss_function


def other_labels(model: Any) -> str | None:
    """Why the labels of ``model`` may be something else; None where its loss compares each token with the next."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder, whose labels are not the next tokens of its inputs"
    if find_embedding(model, "output") is None:
        return f"{name} has no output embeddings: its labels are no tokens"
    if not calls_loss_function(type(model).forward):
        return f"{name} computes a loss of its own: its forward does not call self.loss_function"
    loss = inspect.unwrap(model.loss_function)
    if loss is not ForCausalLMLoss:
        return f"the loss of {name} is {getattr(loss, '__qualname__', type(loss).__name__)}, not ForCausalLMLoss"
    return None
