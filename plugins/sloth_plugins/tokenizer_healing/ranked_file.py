"""Read a byte-level vocabulary in order of merging: tekken's JSON, or tiktoken's lines of a base64 token and its rank.

Both say the same: which byte strings are tokens, and that of all neighbours whose union is a token, those of the lowest
rank are merged first. tekken says too by which pattern texts are cut beforehand, and how many special tokens come
before the others; tiktoken keeps both in code, so there the tokenizer's own pattern is taken.
"""

from __future__ import annotations

import binascii
import functools
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

if TYPE_CHECKING:
    from tiktoken import Encoding

OLD_SPECIALS = {0: "<unk>", 1: "<s>", 2: "</s>"}
"""What all tekken files mean that do not list their special tokens, as far as roles are concerned."""
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""What tekken calls them."""


class NotRanked(ValueError):
    """The file is no vocabulary in order of merging, or a damaged one."""


@dataclass(frozen=True)
class RankedFile:
    """A byte-level vocabulary.

    Attributes:
        path: the file.
        ranks: token -> its place in the order of merging, and in that order.
        offset: what is added to a rank to give the id: the number of special tokens that come first.
        pattern: regular expression by which a text is cut before anything is merged.
        own_pattern: whether the file itself says so.
        specials: id -> special token, as far as the file names them.
        encoding: encodes and decodes; the truth.
    """

    path: Path
    ranks: Mapping[bytes, int] = field(repr=False)
    offset: int
    pattern: str
    own_pattern: bool
    specials: Mapping[int, str] = field(repr=False)
    encoding: Encoding = field(repr=False)
    unknown: int = -1

    @functools.cached_property
    def names(self) -> list[str]:
        """The tokens as byte-level vocabularies write them."""
        text = b"".join(self.ranks).decode("latin-1").translate(letters())  # at once: a call for each is slow
        ends = list(accumulate(map(len, self.ranks)))
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def ids(self) -> list[int]:
        """The id of each of ``names``."""
        return [self.offset + rank for rank in self.ranks.values()]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; no BOS, no EOS."""
        return [[self.offset + rank for rank in self.encoding.encode_ordinary(text)] for text in texts]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        return [self.encoding.decode([number - self.offset for number in row]) for row in ids]

    def role(self, role: str) -> int | None:
        """The id of ``bos_token``, ``eos_token`` or ``unk_token``; None where the file does not say."""
        wanted = ROLES.get(role)
        return next((number for number, token in self.specials.items() if token == wanted), None)


def letters() -> dict[int, str]:
    """Byte -> the printable letter that byte-level vocabularies write for it, as GPT-2 set it."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def is_tekken(path: Path) -> bool:
    """By its name, as mistral-common and transformers do."""
    return path.suffix == ".json" and "tekken" in path.name and path.is_file()


def is_tiktoken(path: Path) -> bool:
    """By its first line: SentencePiece models share the file name."""
    if path.suffix not in (".model", ".tiktoken") or not path.is_file():
        return False
    with path.open("rb") as file:
        parts = file.readline(200).split()
    return len(parts) == 2 and parts[1].isdigit()


def read(path: Path, pattern: str | None = None) -> RankedFile:
    """Load a vocabulary in order of merging.

    Args:
        path: the file.
        pattern: what the tokenizer cuts texts by, for files that do not say.

    Raises:
        NotRanked: the file cannot be read as one, or texts cannot be encoded by it; the message names the reason.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise NotRanked(f"{path.name} is read with the package tiktoken, which is not installed") from error
    try:
        ranks, offset, own, specials = _tekken(path) if is_tekken(path) else _tiktoken(path)
        lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if lacking:
            raise ValueError(f"it lacks {len(lacking)} of the 256 bytes")
        cut = own or pattern
        if cut is None:
            raise ValueError("neither it nor the tokenizer says how texts are cut before merging")
        # Any class of exception: a pattern that the engine refuses is a PanicException or a ValueError.
        encoding = tiktoken.Encoding(path.name, pat_str=cut, mergeable_ranks=dict(ranks), special_tokens={})
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise NotRanked(f"{path.name} cannot be read as a vocabulary in order of merging: {reason}") from error
    return RankedFile(path, ranks, offset, cut, own is not None, specials, encoding)


def _tekken(path: Path) -> tuple[dict[bytes, int], int, str, dict[int, str]]:
    content: Any = from_json(path.read_bytes(), cache_strings="keys")  # in half of the time that json takes
    config = content["config"]
    offset = config["default_num_special_tokens"]
    # The file holds more tokens than the model knows: mistral-common takes the first ones too.
    rows = content["vocab"][: config["default_vocab_size"] - offset]
    ranks = dict(zip(map(a2b_base64, [row["token_bytes"] for row in rows]), range(len(rows)), strict=True))
    if len(ranks) != config["default_vocab_size"] - offset:
        raise ValueError(f"{len(ranks)} different tokens, and it promises {config['default_vocab_size'] - offset}")
    if [row["rank"] for row in rows] != list(range(len(rows))):
        raise ValueError("its tokens do not stand in the order of their ranks")
    listed = content.get("special_tokens")
    specials = OLD_SPECIALS if listed is None else {row["rank"]: row["token_str"] for row in listed}
    return ranks, offset, config["pattern"], dict(specials)


def _tiktoken(path: Path) -> tuple[dict[bytes, int], int, None, dict[int, str]]:
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    pairs = sorted((int(rank), a2b_base64(token, strict_mode=True)) for token, rank in lines)
    ranks = {token: rank for rank, token in pairs}
    if len(set(ranks.values())) != len(lines):
        raise ValueError("a token or a rank stands in it twice")
    return ranks, 0, None, {}
