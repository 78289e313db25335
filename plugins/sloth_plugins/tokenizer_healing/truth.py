"""Fault: the fast tokenizer encodes otherwise than the SentencePiece model it was converted from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, encode, finding
from sloth_plugins.tokenizer_healing.probes import PROBES, without
from sloth_plugins.tokenizer_healing.ranked_file import is_tiktoken
from sloth_plugins.tokenizer_healing.rebuild import CannotRebuild, rebuild
from sloth_plugins.tokenizer_healing.spm_file import Kind, NotSentencePiece, SentencePieceFile, read

SUBJECT = "tokenizer.encode"
PIECES_PER_PROBE, MOST_PIECES = 64, 32768
WORDS_BESIDE_SPACES = 32


class Truth(Protocol):
    """The file that a tokenizer was converted from, able to encode."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def unknown(self) -> int:
        """The id of unk, or -1."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; no BOS, no EOS."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        ...


def load(tokenizer: object) -> SentencePieceFile | None:
    """The SentencePiece model beside a tokenizer; None where there is none.

    Raises:
        NotSentencePiece: there is a file, and it is damaged.
    """
    path = find(tokenizer)
    if path is None or is_tiktoken(path):
        return None
    # A user who asked for no prefix wants to differ from the file in this one respect.
    unprefixed = getattr(tokenizer, "init_kwargs", {}).get("add_prefix_space") is False
    return read(path, add_dummy_prefix=False if unprefixed else None)


def find(tokenizer: object) -> Path | None:
    """``tokenizer.model`` as transformers resolved it, or in the folder that the tokenizer was loaded from."""
    known, folder = getattr(tokenizer, "vocab_file", None), getattr(tokenizer, "name_or_path", None)
    candidates = [Path(known)] if known else []
    candidates += [Path(folder) / "tokenizer.model"] if folder else []
    return next((path for path in candidates if path.suffix == ".model" and path.is_file()), None)


def heal(case: Case) -> list[Finding]:
    """Compare on probe texts; where they differ, rebuild the backend and keep it if it agrees on all of them."""
    truth = case.truth
    if truth is None:
        return []
    stranger = other_vocabulary(case, truth)
    return mend(case, truth, stranger, lambda: probes(case, truth), lambda: rebuild(case, truth))


def mend(
    case: Case,
    truth: Truth,
    stranger: str | None,
    probing: Callable[[], list[str]],
    rebuilding: Callable[[], Tokenizer],
) -> list[Finding]:
    """Where a tokenizer and its origin differ, take a rebuilt one if that agrees on all texts.

    Args:
        case: the tokenizer.
        truth: its origin.
        stranger: why that is another tokenizer's, so that nothing is compared; None where it is this one's.
        probing: gives the texts.
        rebuilding: gives the rebuilt one; may raise CannotRebuild.
    """
    if stranger:
        return [finding("warned", SUBJECT, f"{truth.path.name} belongs to another tokenizer: {stranger}; not used")]
    texts = probing()
    expected = truth.encode(texts)
    rows = list(zip(texts, expected, truth.decode(expected), strict=True))
    wrong = next(differences(case.backend, rows, truth.unknown), None)
    if wrong is None:
        return []
    story = f"differed from {truth.path.name} on probe texts, {wrong}"
    try:
        rebuilt = rebuilding()
    except CannotRebuild as error:
        return [finding("warned", SUBJECT, f"{story}; not mended: {error}")]
    left = next(chain(differences(rebuilt, rows, truth.unknown), _split_specials(case, rebuilt)), None)
    if left is not None:
        return [finding("warned", SUBJECT, f"{story}; not mended: a rebuilt one still differs, {left}")]
    case.set_backend(rebuilt)
    return [finding("changed", SUBJECT, f"{story}; rebuilt from it, now equal on all {len(texts)} of them")]


def probes(case: Case, truth: SentencePieceFile) -> list[str]:
    """The fixed probe texts; the pieces (of large vocabularies: a sample) on lines of their own, many to a text; and
    words behind pieces of spaces."""
    added = {str(token) for token in case.added.values()}
    unwanted = added | {f"<0x{byte:02X}>" for byte in range(256)}
    words = [
        name.replace("\u2581", " ")
        for name in truth.names[:: -(-len(truth.names) // MOST_PIECES)]
        if name not in unwanted
    ]
    rows = ["\n".join(words[i : i + PIECES_PER_PROBE]) for i in range(0, len(words), PIECES_PER_PROBE)]
    rows += _beside_spaces(truth)
    return without((*PROBES, *rows), [token for token in added if truth.kind(token) != Kind.USER_DEFINED])


def _beside_spaces(truth: SentencePieceFile) -> list[str]:
    """Spaces that are a piece by the user's will are one before a word too, which could have merged with the last."""
    found = [piece for piece in truth.pieces if "\u2581" in piece.text]
    words = [piece for piece in found if piece.kind == Kind.NORMAL and piece.text[0] == "\u2581" and piece.text[1:]]
    words = sorted(words, key=lambda piece: -piece.score)[:WORDS_BESIDE_SPACES]
    runs = [piece.text for piece in found if piece.kind == Kind.USER_DEFINED]
    return ["\n".join(run + word.text[1:] for word in words).replace("\u2581", " ") for run in runs if words]


def differences(backend: Tokenizer, rows: list[tuple[str, list[int], str]], unknown: int) -> Iterator[str]:
    """One sentence for each text that ``backend`` encodes, or decodes again, otherwise than the truth.

    Args:
        backend: left as it is.
        rows: texts, their true ids, and what those are decoded to.
        unknown: the id of unk.
    """
    for text, theirs, back in rows:
        (ours,) = encode(backend, [text])
        if ours != theirs:
            yield f"{text[:20]!r} gave {_short(ours)} instead of {_short(theirs)}"
        # How an unknown character reads after decoding is a convention of each library, no fault.
        elif unknown not in ours and (again := backend.decode(ours, skip_special_tokens=False)) != back:
            yield f"{_short(ours)} was decoded to {again[:20]!r} instead of {back[:20]!r}"


def other_vocabulary(case: Case, truth: SentencePieceFile) -> str | None:
    """The first piece whose id is another token in the tokenizer. Control pieces may have been given new names."""
    moved = [i for i, name in enumerate(truth.names) if case.vocab.get(name) != i]
    for i in moved:
        if truth.pieces[i].kind in (Kind.NORMAL, Kind.BYTE):
            return f"its piece {i} is {truth.names[i]!r}, the tokenizer's is {case.backend.id_to_token(i)!r}"
    return None


def _split_specials(case: Case, backend: Tokenizer) -> Iterator[str]:
    """Added tokens that had their one id until now and lose it in ``backend``."""
    texts = [str(token) for token in case.added.values()]
    before, after = encode(case.backend, texts), encode(backend, texts)
    for text, old, new in zip(texts, before, after, strict=True):
        if len(old) == 1 and old != new:
            yield f"{text!r} gave {_short(new)} instead of {old}"


def _short(ids: list[int]) -> str:
    return str(ids if len(ids) <= 8 else [*ids[:8], "..."]).replace("'...'", "...")


__all__ = ["NotSentencePiece", "find", "heal", "load", "mend", "other_vocabulary", "probes"]
