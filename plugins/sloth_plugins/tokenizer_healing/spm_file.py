"""Read a SentencePiece model file: the truth about a tokenizer that was converted from it.

The sentencepiece package encodes, but does not tell a piece's type or the normalizer's options, and its protobuf
classes need a matching protobuf package. So the few fields wanted are read from the wire format (protobuf.dev,
"Encoding") by their numbers in sentencepiece_model.proto.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

UNIGRAM, BPE = 1, 2
"""trainer_spec.model_type of the two algorithms that language models use."""


class Kind(IntEnum):
    """The type of a piece. Only NORMAL, USER_DEFINED and UNUSED ones are ever found in a text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    kind: Kind


class NotSentencePiece(ValueError):
    """The file is no SentencePiece model, or a damaged one."""


@dataclass(frozen=True)
class SentencePieceFile:
    """A SentencePiece model and the options of its normalizer.

    Attributes:
        path: the file.
        processor: encodes and decodes; the truth.
        algorithm: ``UNIGRAM``, ``BPE``, or the number of another.
        byte_fallback: whether characters outside the vocabulary become bytes.
        add_dummy_prefix: whether a text gets a space in front.
        remove_extra_whitespaces: whether spaces are stripped and runs of them shortened to one.
        plain_spaces: whether spaces become U+2581 and stay in front of words, as rebuilding supposes.
        charsmap: compiled normalization rules (NFKC...), empty for none.
    """

    path: Path
    processor: SentencePieceProcessor = field(repr=False)
    algorithm: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    plain_spaces: bool
    charsmap: bytes = field(repr=False)

    @property
    def unknown(self) -> int:
        """The id of unk."""
        return self.processor.unk_id()

    def role(self, role: str) -> int | None:
        """The id of ``bos_token``, ``eos_token`` or ``unk_token``; None where the file has none."""
        number = getattr(self.processor, role.replace("_token", "_id"))()
        return number if number >= 0 else None

    @functools.cached_property
    def names(self) -> list[str]:
        """The text of each piece, by id."""
        return self.processor.id_to_piece(list(range(self.processor.get_piece_size())))

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """Every piece with its score and kind, by id."""
        message = self.processor.serialized_model_proto()
        return [_piece(value) for number, value in fields(message) if number == 1]

    def kind(self, token: str) -> Kind | None:
        """The type of a piece, None for what is none."""
        number = self.processor.piece_to_id(token)
        return self.pieces[number].kind if self.names[number] == token else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; no BOS, no EOS."""
        return self.processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        return [self.processor.decode(list(row)) for row in ids]


def read(path: Path, add_dummy_prefix: bool | None = None) -> SentencePieceFile:
    """Load a SentencePiece model.

    Args:
        path: the file, usually ``tokenizer.model``.
        add_dummy_prefix: overrides the model's own option, for users who load their tokenizer without the prefix.

    Raises:
        NotSentencePiece: the file cannot be read as one; the message names the reason.
    """
    import sentencepiece

    try:
        message = path.read_bytes()
        if add_dummy_prefix is not None:
            # A second normalizer_spec is merged into the first: field 3, 2 bytes long, whose field 3 is the option.
            message += bytes((0x1A, 2, 0x18, add_dummy_prefix))
        processor = sentencepiece.SentencePieceProcessor(model_proto=message)
        if processor.get_piece_size() == 0:
            raise ValueError("it holds no pieces")
        specs = {2: {}, 3: {}}
        for number, value in fields(message):
            if number in specs:
                specs[number].update(fields(value))
    except (OSError, RuntimeError, ValueError, IndexError, struct.error) as error:
        raise NotSentencePiece(f"{path.name} cannot be read as a SentencePiece model: {error}") from error
    return _described(path, processor, specs[2], specs[3])


def _described(path: Path, processor: Any, trainer: dict[int, Any], normalizer: dict[int, Any]) -> SentencePieceFile:
    """Options by field number: trainer_spec 3, 24, 35; normalizer_spec 2 to 5."""
    return SentencePieceFile(
        path,
        processor,
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        plain_spaces=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
        charsmap=normalizer.get(2, b""),
    )


def _piece(message: bytes) -> Piece:
    values = dict(fields(message))
    return Piece(values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], Kind(values.get(3, Kind.NORMAL)))


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """``(field number, value)``: an int for varints, bytes for all else."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(message, place)
        elif wire in (1, 2, 5):
            size, place = _varint(message, place) if wire == 2 else ({1: 8, 5: 4}[wire], place)
            value, place = message[place : place + size], place + size
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place > len(message):
            raise ValueError("the file ends in the middle of a field")
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
