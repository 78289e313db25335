"""Keep the file that a tokenizer was converted from in step: ``tokenizer.model`` (SentencePiece) or ``tekken.json``.

The user's file is never written over. A copy with the new names lies in a folder of the process's own, the tokenizer's
``vocab_file`` leads there. transformers saves neither of the two files with a tokenizer: ``save_vocabulary`` writes the
first, and the second is copied.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sloth_backend.findings import Edits, Finding
from sloth_plugins.chat_templates.spm_edit import edited
from sloth_plugins.tokenizer_healing.case import Case
from sloth_plugins.tokenizer_healing.spm_file import SentencePieceFile
from sloth_plugins.tokenizer_healing.truth import other_vocabulary

CAPABILITY = "chat_templates"


def follow(case: Case, renamed: Mapping[str, str], added: Sequence[str]) -> list[Finding]:
    """Bring the origin's copy in step with the tokenizer, after tokens were renamed or added.

    Args:
        case: the tokenizer as it is now; ``truth`` as it was before.
        renamed: old name -> new name.
        added: tokens with new ids.
    """
    tekken = Path(getattr(case.tokenizer, "vocab_file", None) or "")
    if tekken.suffix == ".json" and "tekken" in tekken.name and tekken.is_file():
        return [_follow_tekken(case, tekken, [*renamed.values(), *added])]
    return [_follow_sentencepiece(case, case.truth, renamed)] if case.truth is not None else []


def _follow_sentencepiece(case: Case, truth: SentencePieceFile, renamed: Mapping[str, str]) -> Finding:
    stranger = other_vocabulary(case, truth)
    if stranger:
        return _skipped(f"{truth.path.name} belongs to another tokenizer, {stranger}")
    names = {truth.processor.piece_to_id(old): new for old, new in renamed.items() if old in set(truth.names)}
    new_ids = range(len(truth.names), max(case.vocab.values()) + 1)
    appended = [token for number in new_ids if (token := case.backend.id_to_token(number)) is not None]
    if len(appended) < len(new_ids):
        return _skipped(f"{truth.path.name} cannot hold the new tokens: the ids after its pieces have holes")
    special = [number in case.added and case.added[number].special for number in new_ids]
    message = edited(truth.path.read_bytes(), names, list(zip(appended, special, strict=True)))
    return _put(case, truth.path, message, f"{len(names)} pieces renamed, {len(appended)} appended")


def _follow_tekken(case: Case, path: Path, tokens: Sequence[str]) -> Finding:
    """Special tokens have the first ids; older files do not list them, since all had the same."""
    content = json.loads(path.read_text(encoding="utf-8"))
    count = content["config"]["default_num_special_tokens"]
    if any(case.vocab[token] >= count for token in tokens):
        return _skipped(f"{path.name} cannot hold the new tokens: its special tokens have the first {count} ids")
    known = {entry["rank"]: entry for entry in content.get("special_tokens") or []}
    content["special_tokens"] = [
        {"is_control": True, **known.get(number, {}), "rank": number, "token_str": case.backend.id_to_token(number)}
        for number in range(count)
    ]
    message = json.dumps(content, ensure_ascii=False).encode()
    return _put(case, path, message, f"{len(tokens)} special tokens renamed")


def _put(case: Case, path: Path, message: bytes, story: str) -> Finding:
    copy = Path(_folder(case.edits), path.name)
    copy.write_bytes(message)
    case.edits.set(case.tokenizer, "vocab_file", str(copy))
    write = (
        "shutil.copy(tokenizer.vocab_file, folder)" if path.suffix == ".json" else "tokenizer.save_vocabulary(folder)"
    )
    reason = f"a copy of {path.name} is in step ({story}); {write} writes it"
    return Finding("changed", "tokenizer.vocab_file", reason, CAPABILITY)


def _folder(edits: Edits) -> str:
    """A folder that goes when the change is taken back, or else with the process."""
    folder = tempfile.mkdtemp(prefix="sloth-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    edits.on_undo(lambda: shutil.rmtree(folder, ignore_errors=True))
    return folder


def _skipped(reason: str) -> Finding:
    return Finding("skipped", "tokenizer.vocab_file", f"left as it is: {reason}", CAPABILITY)
