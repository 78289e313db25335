"""Fault: the fast tokenizer encodes otherwise than the tekken or tiktoken file that it was converted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing import ranked_merges
from sloth_plugins.tokenizer_healing.case import Case, finding
from sloth_plugins.tokenizer_healing.probes import PROBES, without
from sloth_plugins.tokenizer_healing.ranked_file import RankedFile, is_tekken, is_tiktoken, read
from sloth_plugins.tokenizer_healing.rebuild import carry_over
from sloth_plugins.tokenizer_healing.truth import MOST_PIECES, PIECES_PER_PROBE, mend

NAMES = ("tekken.json", "tokenizer.model", "tiktoken.model", "original/tokenizer.model")
"""Where model folders keep them; Llama 3 has its own below ``original``."""
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the ByteLevel pre-tokenizer cuts by when nothing else does."""
UNREACHABLE = 0.01
"""Which part of the tokens a pattern may cut apart: those of a vocabulary's own cut next to none."""


def load(tokenizer: Any) -> RankedFile | None:
    """The tekken or tiktoken file beside a tokenizer; None where there is none.

    Raises:
        NotRanked: there is a file, and it is damaged.
    """
    path = find(tokenizer)
    return None if path is None else read(path, cut_by(tokenizer.backend_tokenizer))


def find(tokenizer: Any) -> Path | None:
    """The file as transformers resolved it, or in the folder that the tokenizer was loaded from."""
    known, folder = getattr(tokenizer, "vocab_file", None), getattr(tokenizer, "name_or_path", None)
    candidates = [Path(known)] if known else []
    candidates += [Path(folder) / name for name in NAMES] if folder else []
    return next((path for path in candidates if is_tekken(path) or is_tiktoken(path)), None)


def cut_by(backend: Tokenizer) -> str | None:
    """The pattern by which a byte-level tokenizer cuts texts, None where it does not."""
    if backend.pre_tokenizer is None:
        return None
    state = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if len(patterns) == 1:
        return patterns[0]
    byte_level = any(step["type"] == "ByteLevel" and step["use_regex"] for step in steps)
    return GPT2 if byte_level and not patterns else None


def heal(case: Case) -> list[Finding]:
    """Compare on probe texts; where they differ, rebuild the backend and keep it if it agrees on all of them."""
    truth = case.ranked
    if truth is None:
        return []
    stranger = _other_vocabulary(case, truth)
    found = mend(case, truth, stranger, lambda: _probes(case, truth), lambda: _rebuilt(case, truth))
    return found if stranger else [*found, *_pattern(truth)]


def merges(truth: RankedFile) -> list[tuple[str, str]]:
    """All pairs that make a token, in an order that gives tiktoken's result as ranks.

    Raises:
        CannotRebuild: see ``ranked_merges``.
    """
    name = truth.names.__getitem__
    left, right = ranked_merges.merges(list(truth.ranks))
    return list(zip(map(name, left.tolist()), map(name, right.tolist()), strict=True))


def _rebuilt(case: Case, truth: RankedFile) -> Tokenizer:
    # tiktoken takes a piece that is a token as it stands, merges or not.
    new = Tokenizer(models.BPE(vocab=case.own_vocab, merges=merges(truth), fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(truth.pattern), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    new.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    new.decoder = decoders.ByteLevel()
    return carry_over(case, new, [token for _, token in sorted(case.added.items())])


def _probes(case: Case, truth: RankedFile) -> list[str]:
    """The fixed probe texts, and the tokens (of large vocabularies: a sample), many to a text."""
    tokens = list(truth.ranks)
    words = []
    for token in tokens[:: -(-len(tokens) // MOST_PIECES)]:
        try:
            words.append(token.decode())
        except UnicodeDecodeError:  # a part of a character: those that it is part of are probes too
            continue
    rows = ["\n".join(words[i : i + PIECES_PER_PROBE]) for i in range(0, len(words), PIECES_PER_PROBE)]
    return without((*PROBES, *rows), [str(token) for token in case.added.values()])


def _other_vocabulary(case: Case, truth: RankedFile) -> str | None:
    """The first token whose id is another's. Special tokens may have been given new names, but no other id."""
    if list(map(case.vocab.get, truth.names)) != truth.ids:
        moved = (pair for pair in zip(truth.names, truth.ids, strict=True) if case.vocab.get(pair[0]) != pair[1])
        return _moved(case, *next(moved))
    specials = ((name, number) for number, name in truth.specials.items() if case.vocab.get(name, number) != number)
    return next((_moved(case, *pair) for pair in specials), None)


def _moved(case: Case, name: str, number: int) -> str:
    return f"its token {number} is {name!r}, the tokenizer's is {case.backend.id_to_token(number)!r}"


def _pattern(truth: RankedFile) -> list[Finding]:
    """tiktoken's file cannot tell the pattern, but it shows which ones are wrong: those that cut its tokens apart."""
    if truth.own_pattern:
        return []
    tokens = list(truth.ranks.items())[:: -(-len(truth.ranks) // MOST_PIECES)]
    texts = [(token.decode(errors="replace"), rank) for token, rank in tokens]
    whole = [(text, rank) for text, rank in texts if "\ufffd" not in text]
    cut = [text for text, rank in whole if truth.encoding.encode_ordinary(text) != [rank]]
    if len(cut) <= UNREACHABLE * len(whole):
        return []
    reason = f"{len(cut)} of {len(whole)} tokens of {truth.path.name}, {cut[0]!r} among them, can never be encoded"
    advice = "texts are cut by another pattern than the one of its training; take the pre-tokenizer of its model card"
    return [finding("warned", "tokenizer.pre_tokenizer", f"{reason}: {advice}")]
