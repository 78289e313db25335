"""Case: one tokenizer under examination, what its faults need to know about it, and the only ways to change it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from sloth_backend.findings import Action, Edits, Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sloth_plugins.tokenizer_healing.ranked_file import RankedFile
    from sloth_plugins.tokenizer_healing.spm_file import SentencePieceFile

CAPABILITY = "tokenizer_healing"


def finding(action: Action, subject: str, reason: str) -> Finding:
    """A finding of this plugin; ``subject`` is an attribute of the tokenizer or the model, ``tokenizer.pad_token``."""
    return Finding(action, subject, reason, CAPABILITY)


@dataclass
class Case:
    """One tokenizer and the record of what is done to it.

    Attributes:
        tokenizer: transformers' tokenizer, changed in place: hosts hold on to this object.
        edits: takes every change, so that it can be taken back.
        truth: the SentencePiece model that lies beside the tokenizer, or None.
        ranked: the tekken or tiktoken file that lies beside it, or None.
    """

    tokenizer: PreTrainedTokenizerFast
    edits: Edits = field(repr=False)
    truth: SentencePieceFile | None = None
    ranked: RankedFile | None = None

    @property
    def origin(self) -> SentencePieceFile | RankedFile | None:
        """The file that the tokenizer was converted from, where there is one."""
        return self.truth or self.ranked

    @property
    def has_pipeline_file(self) -> bool:
        """Whether a ``tokenizer.json`` lies in its folder: it settles all that the origin leaves open."""
        folders = [Path(self.tokenizer.name_or_path or "."), *([self.origin.path.parent] if self.origin else [])]
        return any((folder / "tokenizer.json").is_file() for folder in folders)

    @property
    def backend(self) -> Tokenizer:
        """The Rust tokenizer; looked up each time, since healing may replace it."""
        return self.tokenizer.backend_tokenizer

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included. No fault changes it: healing never grows or renumbers a vocabulary; what
        does must call ``forget``."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def own_vocab(self) -> dict[str, int]:
        """Token -> id of the model inside the backend, without those that stand beside it."""
        own, model = dict(self.vocab), self.backend.model
        # Asking the backend for a second vocabulary takes a fifth of a second where it is large.
        for token in map(str, self.added.values()):
            number = model.token_to_id(token)
            if number is None:
                own.pop(token, None)
            else:
                own[token] = number
        return own

    @functools.cached_property
    def highest(self) -> int:
        """The highest id, -1 where there is no token; told without a copy of the vocabulary where ids have no holes."""
        size, model = self.backend.get_vocab_size(with_added_tokens=False), self.backend.model
        if "vocab" in vars(self) or None in map(model.id_to_token, range(size)):
            return max(self.vocab.values(), default=-1)
        return max(size - 1, max(self.added, default=-1))

    def forget(self) -> None:
        """Look the vocabulary up anew: tokens were given other names, or added."""
        for name in ("vocab", "highest"):
            vars(self).pop(name, None)

    @property
    def added(self) -> dict[int, AddedToken]:
        """Id -> added token; those are cut out of a text before the model sees it."""
        return self.backend.get_added_tokens_decoder()

    def named(self, role: str) -> str | None:
        """The token of a role such as ``eos_token``, without the error that transformers logs where there is none."""
        token = self.tokenizer._special_tokens_map.get(role)
        return None if token is None else str(token)

    def id_of(self, token: str | None) -> int | None:
        """The id of a token, None where the vocabulary lacks it (transformers would answer with that of unk)."""
        return None if token is None else self.backend.token_to_id(token)

    def templates(self) -> str:
        """All chat templates as one text, empty where there is none."""
        template = getattr(self.tokenizer, "chat_template", None)
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    def set_backend(self, backend: Tokenizer) -> None:
        """Put another Rust tokenizer into the same Python object."""
        self.edits.set(self.tokenizer, "_tokenizer", backend)

    def set_named(self, role: str, token: str) -> None:
        """Give a role such as ``pad_token`` to a token of the vocabulary, and keep texts from splitting that token."""
        roles = self.tokenizer._special_tokens_map
        before = roles.get(role)
        self.edits.on_undo(lambda: roles.__setitem__(role, before))
        setattr(self.tokenizer, role, token)
        if self.vocab[token] not in self.added:
            self.mark_special(token)

    def mark_special(self, token: str) -> None:
        """Have ``token``, which the vocabulary knows already, cut out of texts as one piece."""
        # Added tokens cannot be removed from a backend again: a clone gets them, and undo brings the original back.
        clone = Tokenizer.from_str(self.backend.to_str())
        clone.encode_special_tokens = self.backend.encode_special_tokens
        clone.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        self.set_backend(clone)


def encode(backend: Tokenizer, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
    """The ids of each text, without padding and truncation.

    Args:
        backend: left as it is.
        texts: taken one by one: a batch would start threads, and tokenizers warns when a process forks after that.
        specials: whether to add what the post-processor adds, such as BOS.
    """
    with _bare(backend):
        return [backend.encode(text, add_special_tokens=specials).ids for text in texts]


@contextmanager
def _bare(backend: Any) -> Iterator[None]:
    """Padding and truncation are state of a backend, left over from its file or from the last call: off, and back."""
    padding, truncation, split = backend.padding, backend.truncation, backend.encode_special_tokens
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    try:
        yield
    finally:
        backend.encode_special_tokens = split
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def show(token: str | None, number: int | None) -> str:
    """``'</s>' (id 2)`` for a finding."""
    return (
        "missing" if token is None else f"{token!r} ({'not in the vocabulary' if number is None else f'id {number}'})"
    )
