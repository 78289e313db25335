"""Fault: a text changes on its way through decode and encode, or the tokenizer on its way through save and load.

Several of transformers' classes build their pipeline in ``__init__`` and take only vocabulary and merges from
``tokenizer.json``: what was changed in the pipeline, by healing or by hand, is lost when a checkpoint is loaded.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sloth_backend.findings import Finding
from sloth_plugins.tokenizer_healing.case import Case, encode, finding
from sloth_plugins.tokenizer_healing.probes import PROBES, without

PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
SUBJECT = "tokenizer.save_pretrained"


def heal(case: Case) -> list[Finding]:
    """Report texts that do not survive; have a tokenizer that does not survive saved as the class that keeps all."""
    return [*_decode(case), *_reload(case)]


def _decode(case: Case) -> list[Finding]:
    """Encode, decode, encode: the ids must come back. The text need not: normalizers are meant to change it."""
    unk = case.id_of(case.named("unk_token"))
    texts = without(PROBES, [str(token) for token in case.added.values()])
    rows = [(text, ids) for text, ids in zip(texts, encode(case.backend, texts), strict=True) if unk not in ids]
    decoded = [case.backend.decode(ids, skip_special_tokens=False) for _, ids in rows]
    wrong = [
        f"{text[:20]!r} came back as {back[:20]!r}"
        for (text, ids), back, again in zip(rows, decoded, encode(case.backend, decoded), strict=True)
        if ids != again
    ]
    reason = f"{len(wrong)} of {len(rows)} probe texts change when they are decoded and encoded again"
    return [finding("warned", "tokenizer.decode", f"{reason}: {wrong[0]}")] if wrong else []


def _reload(case: Case) -> list[Finding]:
    """Where a mend or a user's own change does not survive, take the class that keeps it, if nothing else is lost."""
    before = lost(case)
    if before is None:
        return []
    if _adds_nothing(type(case.tokenizer)):
        name, mark = type(case.tokenizer).__name__, case.edits.mark()
        _become_generic(case)
        if lost(case) is None:
            kept = f"now saved as {type(case.tokenizer).__name__}, not {name}, which keeps it"
            return [finding("changed", SUBJECT, f"lost in save and load: {before}; {kept}")]
        case.edits.rollback(mark)
    return [finding("warned", SUBJECT, f"lost in save and load: {before}")]


def lost(case: Case) -> str | None:
    """The first probe text that is encoded otherwise after save and load, or why that cannot be known, or None."""
    try:
        if _pipeline_survives(case.tokenizer):
            return None
        loaded = _saved_and_loaded(case.tokenizer).backend_tokenizer
    except Exception as error:  # Python components, classes that AutoTokenizer does not know...
        return f"all of it, it seems ({type(error).__name__}: {error})"
    for specials in (False, True):
        pairs = zip(encode(case.backend, PROBES, specials), encode(loaded, PROBES, specials), strict=True)
        for text, (ours, theirs) in zip(PROBES, pairs, strict=True):
            if ours != theirs:
                return f"{text[:20]!r} gives {ours[:8]}, afterwards {theirs[:8]}"
    return None


def _saved_and_loaded(tokenizer: PreTrainedTokenizerFast) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _copy_config(tokenizer, Path(folder))
        if type(tokenizer).__module__.startswith("transformers."):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return type(tokenizer).from_pretrained(folder, local_files_only=True)


def _copy_config(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A checkpoint's config.json has a say in which class AutoTokenizer takes; what names code to run is left out."""
    config = Path(tokenizer.name_or_path or folder) / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        wanted = ("model_type", "tokenizer_class", "transformers_version")
        (folder / "config.json").write_text(json.dumps({key: content[key] for key in wanted if key in content}))


def _pipeline_survives(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a twin with a tiny vocabulary comes back with the same pipeline: loading the whole takes seconds."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.BPE):
        return False
    twin = copy.copy(tokenizer)
    needed = _needed(tokenizer)
    twin._tokenizer = _with_tiny_vocabulary(backend, needed)
    # Hundreds of reserved tokens, each added again when it is loaded, take longer than all else.
    twin._extra_special_tokens = [token for token in tokenizer._extra_special_tokens if str(token) in needed]
    listed = {"added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"}
    twin.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name not in listed}
    try:
        loaded = _saved_and_loaded(twin)
    except Exception:  # a class may need tokens that the twin lacks: the whole one will tell
        return False
    return _pipeline(twin._tokenizer) == _pipeline(loaded.backend_tokenizer)


def _needed(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The added tokens that have a role, or that the pipeline names."""
    pipeline = [getattr(tokenizer.backend_tokenizer, part) for part in PARTS]
    written = " ".join(part.__getstate__().decode() for part in pipeline if part is not None)
    roles = {str(token) for token in tokenizer._special_tokens_map.values() if token is not None}
    added = map(str, tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
    return {token for token in added if token in roles or json.dumps(token, ensure_ascii=False) in written}


def _with_tiny_vocabulary(backend: Tokenizer, tokens: set[str]) -> Tokenizer:
    """The same pipeline around a model that knows these added tokens alone."""
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items()) if str(token) in tokens]
    old = backend.model
    vocab = {str(token): number for number, token in enumerate(added)}
    options = {
        name: getattr(old, name) for name in ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "dropout")
    }
    tiny = Tokenizer(models.BPE(vocab=vocab, merges=[], **options))
    tiny.add_tokens(added)
    for part in PARTS:
        if getattr(backend, part) is not None:
            setattr(tiny, part, getattr(backend, part))
    return tiny


def _pipeline(backend: Tokenizer) -> Any:
    """Everything about a backend but its tokens, their ids, and what padding and truncation were last."""
    return _without_ids({k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")})


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("vocab", "merges", "added_tokens", "ids")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


def _adds_nothing(kind: type) -> bool:
    """Whether a class differs from the generic one by its ``__init__`` and by data only."""
    own = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    members = [(name, value) for cls in own for name, value in vars(cls).items() if name not in ("__init__", "model")]
    return bool(own) and not any(callable(v) or hasattr(type(v), "__get__") for n, v in members if n != "__weakref__")


def _become_generic(case: Case) -> None:
    """Make this one object an instance of the class that reads all of ``tokenizer.json`` as it stands."""
    tokenizer, kind = case.tokenizer, type(case.tokenizer)
    case.edits.on_undo(lambda: setattr(tokenizer, "__class__", kind))
    tokenizer.__class__ = PreTrainedTokenizerFast
