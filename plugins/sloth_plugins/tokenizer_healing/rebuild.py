"""Build the Rust tokenizer that encodes as a SentencePiece model does, around the vocabulary that is there.

Four things make SentencePiece differ from what a plain conversion gives:

- BPE merges the pair whose *result* has the highest score, not the lowest id, and of equals the leftmost. In order of
  falling score, and among equals of the longest left half, tokenizers' ranks come to the same result: such a tie is a
  run of one character, which SentencePiece grows from its left end.
- Control, unknown and byte pieces never take part in merges.
- The dummy prefix is put before *every* text, one that starts with a space included; tokenizers' Metaspace leaves that
  one out. So spaces become U+2581 first, then a Metaspace that looks for a real space finds none and always adds one,
  and a second Metaspace turns that one into U+2581. Where extra whitespace is removed it is the other way round: one
  leading space stays and is the prefix, since Metaspace takes a text that lost its start for the middle of another.
- User-defined pieces are cut out after spaces have become U+2581, not before.

What SentencePiece does not settle is kept: vocabulary, ids, added tokens, post-processor, and whether a text that
follows a special token gets a prefix too (Llama's ``legacy``).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sloth_plugins.tokenizer_healing.case import Case, encode
from sloth_plugins.tokenizer_healing.spm_file import BPE, UNIGRAM, Kind, Piece, SentencePieceFile

SPACE = "\u2581"
ALL = 1 << 16
"""More leading spaces than any text has."""
_IN_TEXTS = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)


class CannotRebuild(ValueError):
    """The origin does something that tokenizers cannot express; the message says what."""


def rebuild(case: Case, truth: SentencePieceFile) -> Tokenizer:
    """A new backend with the tokenizer's vocabulary and added tokens, and the pipeline and merges of ``truth``.

    Raises:
        CannotRebuild: the model has options that are not supported here, or ids would change.
    """
    if not truth.plain_spaces:
        raise CannotRebuild("it does not mark words by a leading space")
    new = Tokenizer(_model(case.own_vocab, truth))
    new.normalizer = _normalizer(truth)
    new.pre_tokenizer = _pre_tokenizer(truth, prefix_everywhere(case))
    new.decoder = _decoder(truth)
    return carry_over(case, new, _added(case, truth))


def carry_over(case: Case, new: Tokenizer, added: list[AddedToken]) -> Tokenizer:
    """Give ``new`` what the origin does not settle: added tokens, post-processor, padding, truncation.

    Raises:
        CannotRebuild: ids would change.
    """
    old = case.backend
    if old.post_processor is not None:
        new.post_processor = old.post_processor
    new.add_tokens(added)
    model: Any = new.model
    beside = sum(model.token_to_id(str(token)) is None for token in added)
    same = new.get_vocab_size(with_added_tokens=False) + beside == len(case.vocab)
    if not same or any(new.token_to_id(str(token)) != case.vocab[str(token)] for token in added):
        raise CannotRebuild("the added tokens would get other ids")
    new.encode_special_tokens = old.encode_special_tokens
    if old.truncation is not None:
        new.enable_truncation(**old.truncation)
    if old.padding is not None:
        new.enable_padding(**old.padding)
    return new


def prefix_everywhere(case: Case) -> bool:
    """Whether the tokenizer, as it is, puts a prefix before a text that follows a special token."""
    special = next((str(token) for token in case.added.values() if token.special and not token.rstrip), None)
    if special is None:
        return True
    ids = encode(case.backend, [f"{special}x"])[0]
    return len(ids) > 1 and (case.backend.id_to_token(ids[1]) or "").startswith(SPACE)


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece's BPE may merge, in an order that gives its result as ranks."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind in _IN_TEXTS}
    pairs = [
        (score, cut, len(text) - cut, text)
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(text[:cut], text[cut:]) for _, cut, _, text in pairs]


def _model(vocab: dict[str, int], truth: SentencePieceFile) -> Any:
    tokens = {number: token for token, number in vocab.items()}
    unknown = truth.processor.unk_id()
    if truth.algorithm == BPE:
        return models.BPE(
            vocab=vocab,
            merges=merges(truth.pieces),
            unk_token=tokens.get(unknown),
            fuse_unk=True,
            byte_fallback=truth.byte_fallback,
        )
    if truth.algorithm == UNIGRAM:
        if sorted(tokens) != list(range(len(vocab))):
            raise CannotRebuild("the vocabulary's ids have holes")
        scores = _unigram_scores(truth.pieces, len(vocab))
        entries = [(tokens[number], score) for number, score in enumerate(scores)]
        return models.Unigram(entries, unk_id=unknown, byte_fallback=truth.byte_fallback)
    raise CannotRebuild(f"its algorithm (number {truth.algorithm}) is neither BPE nor Unigram")


def _unigram_scores(pieces: list[Piece], size: int) -> list[float]:
    """Score by id. What is never found in a text gets one that no path can afford, where the file says 0, the best."""
    never = min(piece.score for piece in pieces) - 100
    scores = [piece.score if piece.kind in _IN_TEXTS else never for piece in pieces]
    return scores + [never] * (size - len(scores))


def _added(case: Case, truth: SentencePieceFile) -> list[AddedToken]:
    """The tokenizer's added tokens in the order of their ids; those that stand for spaces match normalized text."""
    tokens = [token for _, token in sorted(case.added.items())]
    spaces = [SPACE in str(token) and truth.kind(str(token)) == Kind.USER_DEFINED for token in tokens]
    return [
        AddedToken(str(token), normalized=True, special=token.special) if space else token
        for token, space in zip(tokens, spaces, strict=True)
    ]


def _normalizer(truth: SentencePieceFile) -> Any:
    steps: list[Any] = [normalizers.Precompiled(truth.charsmap)] if truth.charsmap else []
    if not truth.remove_extra_whitespaces:
        return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not truth.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
    # At the end of a text SentencePiece takes U+2581 for a space too.
    for pattern, content in ((rf"[ {SPACE}]+\z", ""), (" {2,}", " ")):
        steps.append(normalizers.Replace(Regex(pattern), content))
    return normalizers.Sequence(steps)


def _pre_tokenizer(truth: SentencePieceFile, everywhere: bool) -> Any:
    """Puts the dummy prefix before every text, or only where a text starts that is not cut off by a special token."""
    scheme = "never" if not truth.add_dummy_prefix else "always" if everywhere else "first"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
        ]
    )


def _decoder(truth: SentencePieceFile) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if truth.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if truth.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", left=ALL, right=0))
    elif truth.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1, right=0))
    return decoders.Sequence(steps)
