"""Real SentencePiece files and trained ones: what transformers makes of them, and what healing does."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from integration_tests.plugins.tokenizer_healing.common import (
    REAL,
    actions,
    dressed,
    edit_backend,
    heal,
    random_texts,
    real_folder,
)
from sloth_backend.findings import Edits
from sloth_plugins.tokenizer_healing import truth
from sloth_plugins.tokenizer_healing.case import Case, encode
from sloth_plugins.tokenizer_healing.probes import PROBES
from sloth_plugins.tokenizer_healing.rebuild import merges
from sloth_plugins.tokenizer_healing.spm_file import Kind, NotSentencePiece, Piece, read


@pytest.mark.parametrize("version", REAL)
def test_intact_files_are_converted_wrongly_and_healed(tmp_path: Path, version: str, stdlib_lines: list[str]) -> None:
    folder = real_folder(tmp_path, version, add_bos_token=True)
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode(" lead", add_special_tokens=False) != oracle.encode(" lead")  # the fault exists
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    findings = heal(tokenizer)
    assert actions(findings)["tokenizer.encode"] == "changed"
    texts = stdlib_lines[:: max(1, len(stdlib_lines) // 4000)] + random_texts(1000) + [" " * n for n in range(1, 99)]
    specials = [str(token) for token in added.values()]
    texts = [text for text in texts if not any(special in text for special in specials)]
    assert len(texts) > 4000
    assert encode(tokenizer.backend_tokenizer, texts) == oracle.encode(texts)
    assert tokenizer.batch_decode(oracle.encode(texts)) == oracle.decode(oracle.encode(texts))
    assert tokenizer.get_vocab() == vocab
    assert {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()} == dict(enumerate(specials))
    assert tokenizer("x").input_ids == [tokenizer.bos_token_id, *oracle.encode("x")]
    assert [tokenizer.encode(token, add_special_tokens=False) for token in specials] == [[i] for i in added]
    assert tokenizer.decode(tokenizer("a</s>").input_ids, skip_special_tokens=True) == "a"


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=8, max_size=8))
def test_any_text_is_encoded_as_sentencepiece_does(v3: tuple[Any, Any], texts: list[str]) -> None:
    tokenizer, oracle = v3
    # Special tokens are cut out of texts before they are encoded; SentencePiece knows none.
    texts = [text for text in texts if not any(special in text for special in tokenizer.all_special_tokens)]
    assert encode(tokenizer.backend_tokenizer, texts) == oracle.encode(texts)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The healed tokenizer of version 3 and its SentencePiece processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "true")
        folder = real_folder(tmp_path_factory.mktemp("v3"), "v3")
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    heal(tokenizer)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_offsets_point_into_the_text(v3: tuple[Any, Any]) -> None:
    text = "héllo  wörld\n[INST]x [/INST] end"
    encoded = v3[0](text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "[INST]" in pieces
    assert "".join(pieces) == text


@pytest.mark.parametrize("copied", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_healed_tokenizer_can_be_copied(v3: tuple[Any, Any], copied: Callable[[Any], Any]) -> None:
    assert copied(v3[0])(list(PROBES)).input_ids == v3[0](list(PROBES)).input_ids


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "gemma": {
            "add_dummy_prefix": False,
            "user_defined_symbols": ["\n\n", "<start_of_turn>", "\u2581\u2581\u2581\u2581"],
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
        },
        "symbols": {"user_defined_symbols": ["<sep>", "foo"]},
        "digits": {"split_digits": True},
    }.items(),
)
@pytest.mark.parametrize("kind", [LlamaTokenizer, PreTrainedTokenizerFast])
def test_other_models_of_the_kind(
    tmp_path: Path,
    trained: Callable[..., Path],
    stdlib_lines: list[str],
    name: str,
    options: dict[str, Any],
    kind: type[PreTrainedTokenizerFast],
) -> None:
    folder = dressed(tmp_path, trained(name, **options))
    tokenizer = kind.from_pretrained(folder)
    found = actions(heal(tokenizer))
    # The generic class gets some of these right by itself; LlamaTokenizer none.
    assert found.get("tokenizer.encode", "changed" if kind is PreTrainedTokenizerFast else None) == "changed"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text for text in stdlib_lines[:1500] + random_texts(400) if "<s" not in text]
    assert encode(tokenizer.backend_tokenizer, texts) == oracle.encode(texts)


def test_spaces_that_are_a_piece_are_looked_for_before_words(tmp_path: Path, trained: Callable[..., Path]) -> None:
    """Matched before spaces became U+2581, such a piece is only found where nothing merges with its last one."""
    spaces = "\u2581" * 4
    folder = dressed(tmp_path, trained("spaces", user_defined_symbols=[spaces], add_dummy_prefix=False))
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    heal(tokenizer)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [f"x{' ' * count}|" for count in range(12)]

    def match_before(content: dict[str, Any]) -> None:
        """As transformers 5.20 converts such a file, where a word comes before two spaces."""
        options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        own = {"id": oracle.piece_to_id(spaces), "content": spaces, **options}
        others = [token for token in content["added_tokens"] if token["content"] != spaces]
        content.update(pre_tokenizer=None, added_tokens=sorted([*others, own], key=lambda token: token["id"]))
        merges, first = content["model"]["merges"], ["\u2581", "|"]
        merges.remove(first)
        merges.insert(0, first)

    edit_backend(tokenizer, match_before)
    assert encode(tokenizer.backend_tokenizer, texts) != oracle.encode(texts)
    assert actions(heal(tokenizer))["tokenizer.encode"] == "changed"
    assert encode(tokenizer.backend_tokenizer, texts) == oracle.encode(texts)


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        "no bytes": {"byte_fallback": False, "remove_extra_whitespaces": True},
        "stripped, no prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    }.items(),
)
def test_normalizing_models(
    tmp_path: Path, trained: Callable[..., Path], stdlib_lines: list[str], name: str, options: dict[str, Any]
) -> None:
    folder = dressed(tmp_path, trained(name, **options))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert actions(heal(tokenizer))["tokenizer.encode"] == "changed"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text for text in stdlib_lines[:1500] + list(PROBES) if "<" not in text]
    assert encode(tokenizer.backend_tokenizer, texts) == oracle.encode(texts)


def test_file_options_and_kinds(trained: Callable[..., Path]) -> None:
    path = trained("symbols", user_defined_symbols=["<sep>", "foo"])
    file = read(path)
    assert (file.add_dummy_prefix, file.remove_extra_whitespaces, file.byte_fallback) == (True, False, True)
    kinds = [piece.kind for piece in file.pieces[:6]]
    assert kinds == [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.USER_DEFINED, Kind.USER_DEFINED, Kind.BYTE]
    scores = [file.processor.get_score(i) for i in range(600)]
    assert [piece.score for piece in file.pieces] == scores
    assert read(path, add_dummy_prefix=False).processor.encode("x", out_type=str) == ["x"]
    with pytest.raises(NotSentencePiece, match="cannot be read"):
        read(path.with_name("absent.model"))


def test_merges_go_by_score_and_make_nothing_that_texts_cannot_hold() -> None:
    texts = {"a": -9, "b": -9, "ab": -2, "aa": -1, "aaa": -1, "<0x": -3, "0A>": -3}
    pieces = [Piece(text, score, Kind.NORMAL) for text, score in texts.items()]
    pieces += [Piece("<0x0A>", 0, Kind.BYTE), Piece("aab", 0, Kind.CONTROL)]
    assert merges(pieces) == [("aa", "a"), ("a", "aa"), ("a", "a"), ("a", "b")]


def test_probes_start_no_threads(healthy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers warns in every worker that is forked after a batch was encoded."""
    case = Case(healthy, Edits(), truth.load(healthy))
    for name in ("encode_batch", "encode_batch_fast"):
        assert name not in Path(sys.modules[encode.__module__].__file__ or "").read_text()
    assert len(truth.probes(case, case.truth)) > 200  # pyright: ignore[reportArgumentType]
