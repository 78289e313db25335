"""What the tests of tokenizer healing share: files, texts, the hooks, and ways to look at a tokenizer."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
)

from sloth_backend.config import SlothConfig
from sloth_backend.findings import Edits, Finding
from sloth_backend.run import Run
from sloth_plugins import tokenizer_healing

REAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
MODULES = ("argparse", "json", "collections", "email", "typing", "asyncio", "pathlib", "decimal", "inspect", "random")


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 characters from all of Unicode, and of spaces, line ends and U+2581 in all neighbourhoods."""
    source = random.Random(seed)
    ranges = [(0x20, 0x7F), (0, 0x250), (0, 0x3000), (0x4E00, 0x9FFF), (0xF900, 0xFFFE), (0x1F300, 0x1F9FF)]

    def character() -> str:
        return chr(source.randrange(*source.choice(ranges))) if source.random() < 0.7 else source.choice("  \n\u2581")

    wild = ["".join(character() for _ in range(source.randrange(1, 40))) for _ in range(count)]
    narrow = ["".join(source.choices(" ab\n\u2581e\t.", k=source.randrange(1, 40))) for _ in range(count)]
    return wild + narrow


def real_folder(folder: Path, version: str, **config: Any) -> Path:
    """A folder with one of the SentencePiece files of mistral-common, and a tokenizer_config.json if asked for."""
    package = importlib.util.find_spec("mistral_common")
    assert package is not None, "mistral-common, a test dependency, is not installed"
    data = Path(str(package.submodule_search_locations[0])) / "data"  # pyright: ignore[reportOptionalSubscript]
    return dressed(folder, data / REAL[version], **config)


def dressed(folder: Path, model: Path, **config: Any) -> Path:
    """``folder`` with ``model`` as its tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "tokenizer.model")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def heal(tokenizer: Any, edits: Edits | None = None, **options: Any) -> list[Finding]:
    """Run the hook of phase A."""
    run = Run("user", SlothConfig(**options))
    return tokenizer_healing.sloth_heal_tokenizer(tokenizer, run, edits or Edits()) or []


def heal_with(model: Any, tokenizer: Any, edits: Edits | None = None) -> list[Finding]:
    """Run the hook of phase B."""
    run = Run("user", SlothConfig())
    return tokenizer_healing.sloth_fix_embeddings(model, tokenizer, run, edits or Edits()) or []


def actions(findings: list[Finding]) -> dict[str, str]:
    """Subject -> action."""
    return {f.subject: f.action for f in findings}


def state(tokenizer: Any) -> dict[str, Any]:
    """What a host can see of a tokenizer, comparable."""
    return {
        "class": type(tokenizer),
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": dict(tokenizer._special_tokens_map),
        "attributes": sorted(vars(tokenizer)),
        "add_bos_token": tokenizer.add_bos_token,
    }


def assert_not_compared(tokenizer: Any) -> None:
    """Healing says that the file beside it belongs to another tokenizer, and changes nothing."""
    before = state(tokenizer)
    [finding] = heal(tokenizer)
    assert (finding.action, finding.subject) == ("warned", "tokenizer.encode")
    assert "belongs to another tokenizer" in finding.reason
    assert state(tokenizer) == before


def edit_backend(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a tokenizer's ``tokenizer.json`` and put it back."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def byte_level(*pieces: str, **names: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens ``names``, ordinary ``pieces`` and no truth beside it."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


BASE = {"bos_token": "<s>", "eos_token": "</s>"}
