"""Rename and append pieces of a SentencePiece model, field by field: every other field stays as it was.

The file is one protobuf message (sentencepiece_model.proto): field 1, repeated, holds the pieces in the order of their
ids; field 2 the trainer's options, which name bos, eos, unk and pad. A second field 2 is merged into the first.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from sloth_plugins.tokenizer_healing.spm_file import Kind, fields

PIECE, TRAINER = 1, 2
TEXT, SCORE, KIND = 1, 2, 3
"""Fields of a piece."""
VOCAB_SIZE, ROLES = 4, {45: b"<unk>", 46: b"<s>", 47: b"</s>", 48: b"<pad>"}
"""Fields of the trainer's options: the number of pieces, and the names of four roles with their defaults."""
VARINT, BYTES, FLOAT = 0, 2, 5
"""Wire types."""


def edited(message: bytes, names: Mapping[int, str], appended: Sequence[tuple[str, bool]]) -> bytes:
    """A SentencePiece model with other names for some pieces, and more pieces at its end.

    Args:
        message: the file.
        names: id -> new name; these pieces become control pieces, which no text can give.
        appended: ``(name, special)`` of the pieces that get the ids after the last: control pieces where special, else
            user-defined ones.
    """
    pieces = [value for number, value in fields(message) if number == PIECE]
    changed = {dict(fields(pieces[number]))[TEXT]: name.encode() for number, name in names.items()}
    out = [_field(number, _renamed(value, changed) if number == PIECE else value) for number, value in fields(message)]
    kinds = {True: Kind.CONTROL, False: Kind.USER_DEFINED}
    out += [_field(PIECE, _piece(name.encode(), 0.0, kinds[special])) for name, special in appended]
    options = _roles(message, changed)
    if appended:
        options += _number(VOCAB_SIZE, len(pieces) + len(appended))
    return b"".join([*out, _field(TRAINER, options) if options else b""])


def _renamed(piece: bytes, changed: Mapping[bytes, bytes]) -> bytes:
    values = dict(fields(piece))
    if values[TEXT] not in changed:
        return piece
    return _piece(changed[values[TEXT]], struct.unpack("<f", values.get(SCORE, bytes(4)))[0], Kind.CONTROL)


def _roles(message: bytes, changed: Mapping[bytes, bytes]) -> bytes:
    """The trainer's options that name a renamed piece: without them the processor would find no eos."""
    roles = dict(ROLES)
    for number, value in fields(message):
        if number == TRAINER:
            roles |= {key: name for key, name in fields(value) if key in ROLES}
    return b"".join(_field(number, changed[name]) for number, name in roles.items() if name in changed)


def _piece(text: bytes, score: float, kind: Kind) -> bytes:
    return _field(TEXT, text) + _key(SCORE, FLOAT) + struct.pack("<f", score) + _number(KIND, kind)


def _field(number: int, value: bytes) -> bytes:
    return _key(number, BYTES) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _key(number, VARINT) + _varint(value)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    """An integer in groups of seven bits, lowest first; each byte but the last has its highest bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
