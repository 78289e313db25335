"""Compare healed tokenizers of real files with their truth on 100,000 texts and more, and time healing.

    python -m integration_tests.benchmarks.tokenizers --out docs/benchmarks [--only v3] [--faults]

Writes ``tokenizers.json`` after each file, and ``tokenizers.md``, a table of it. With ``--faults`` each tokenizer is
also broken in every way that healing knows of, which takes a minute or more for a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from datasets import Dataset

from integration_tests.plugins.tokenizer_healing.breaks import (
    BREAKS,
    FILES,
    applies,
    clean,
    heal_all,
    load,
    model_for,
    oracle,
    outcome,
)
from integration_tests.plugins.tokenizer_healing.common import edit_backend
from sloth_backend.data import Rows
from sloth_plugins.data_checks import look_at
from sloth_plugins.data_checks.facts import facts_of
from sloth_plugins.tokenizer_healing.case import encode
from sloth_plugins.tokenizer_healing.probes import PROBES, without

PACKAGES = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "mistral-common")
LINES, RANDOM = 60_000, 20_000
EXAMPLES, REPEATS = 5, 3
TIMES = ("seconds to look again", "seconds to rebuild", "data checks, % of tokenising")


def texts() -> list[str]:
    """Different texts: lines of Python's standard library, whole docstrings, all of Unicode, random bytes."""
    return list(dict.fromkeys([*PROBES, *_source(), *_unicode(), *_bytes()]))


def _source() -> list[str]:
    """Lines of the sources, and every tenth file's docstrings with their line ends."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    contents = [
        file.read_text(encoding="utf-8", errors="replace") for file in files if "site-packages" not in str(file)
    ]
    lines = list(dict.fromkeys(line for content in contents for line in content.split("\n")))
    docstrings = [part for content in contents[::10] for part in content.split('"""')[1::2]]
    return random.Random(0).sample(lines, min(LINES, len(lines))) + docstrings


def _unicode() -> Iterator[str]:
    """Every assigned character: those below U+3400 alone, between letters and twice, the others in rows."""
    known = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n)) not in ("Cn", "Cs", "Co")]
    low = [character for character in known if character < "\u3400"]
    for character in low:
        yield from (character, f"a{character}b", f" {character}{character}")
    high = known[len(low) :]
    yield from ("".join(high[place : place + 16]) for place in range(0, len(high), 16))
    yield from ("".join(high[place::4096]) for place in range(4096))


def _bytes() -> Iterator[str]:
    source = random.Random(1)
    for _ in range(RANDOM):
        yield source.randbytes(source.randrange(1, 48)).decode("utf-8", errors="replace")


def compare(version: str) -> dict[str, Any]:
    """What transformers converts a file to, before and after healing, against the truth."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        tokenizer = load(version, folder)
        specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        rows = without(tuple(texts()), specials)
        truth = oracle(version, folder)(rows)
        model = model_for(tokenizer)
        gc.freeze()  # what is compared here is no part of healing, nor is walking over it
        before = _different(tokenizer, rows, truth)
        seconds, found = _timed(lambda: heal_all(tokenizer, model))
        after = _different(tokenizer, rows, truth)
        tokenizer.save_pretrained(folder)
        again, second = _timed(lambda: heal_all(tokenizer, model), REPEATS)
        checking = data_checks(tokenizer, model, rows)
        rebuilding = statistics.median(_rebuilding(tokenizer, model) for _ in range(REPEATS))
    return {
        "vocabulary": len(tokenizer),
        "texts": len(rows),
        "different before": len(before),
        "different after": len(after),
        "examples before": before[:EXAMPLES],
        "examples after": after[:EXAMPLES],
        "seconds to heal": round(seconds, 2),
        "seconds to look again": round(again, 2),
        "seconds to rebuild": round(rebuilding, 2),
        **checking,
        "findings": [f"{f.action} {f.subject}: {f.reason}" for f in found],
        "findings on the healed one": [f"{f.action} {f.subject}: {f.reason}" for f in second if f.action != "skipped"],
    }


def data_checks(tokenizer: Any, model: Any, rows: list[str]) -> dict[str, float]:
    """Processor seconds in which rows are tokenised, and in which all of them are looked at before the first step."""
    tokenising, ids = _timed(lambda: tokenizer(rows)["input_ids"])
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    facts = facts_of(model, tokenizer)
    looking, _ = _timed(lambda: look_at(Rows("train", dataset, 64, "keep_start"), facts))
    return {
        "seconds to tokenise": round(tokenising, 2),
        "seconds of data checks": round(looking, 3),
        "data checks, % of tokenising": round(100 * looking / tokenising, 2),
    }


def faults(version: str) -> dict[str, Any]:
    """What became of every fault that a file's tokenizer can have: ``healed``, ``reported``, or what was missed."""
    results = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer = clean(version, Path(place) / "model")
        for fault in BREAKS:
            if applies(fault, version):
                as_wanted = "healed" if fault.action == "changed" else "reported"
                results[fault.name] = outcome(fault, tokenizer) or as_wanted
    return results


def _different(tokenizer: Any, rows: list[str], truth: list[list[int]]) -> list[dict[str, Any]]:
    pairs = zip(rows, encode(tokenizer.backend_tokenizer, rows), truth, strict=True)
    return [{"text": text, "ids": ours[:12], "truth": theirs[:12]} for text, ours, theirs in pairs if ours != theirs]


def _rebuilding(tokenizer: Any, model: Any) -> float:
    edit_backend(tokenizer, lambda content: content.update(normalizer={"type": "Lowercase"}))
    return _timed(lambda: heal_all(tokenizer, model))[0]


def _timed(action: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Seconds of this process's own time, since others use the machine too, and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Tokenizers of real files against their truth",
        "",
        "Texts that are encoded otherwise than by SentencePiece or mistral-common, as transformers converts the file",
        "and after healing; processor seconds of all checks on a healthy one, and of checks and rebuilding on a broken",
        "one (medians of three); data checks of these texts as rows, in % of the time of tokenising them; faults",
        "put in on purpose.",
        "",
        "| file | tokens | texts | different before | after | look, s | rebuild, s | data checks, % | faults healed + "
        "reported / put in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["files"].items():
        keys = ("vocabulary", "texts", "different before", "different after")
        counts = [f"{row[key]:,}" if key in row else "-" for key in keys]
        times = " | ".join(str(row.get(key, "-")) for key in TIMES)
        lines.append(f"| {name} | {' | '.join(counts)} | {times} | {_counted(row.get('faults'))} |")
    packages = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    made = f"Python {results['python']}, {packages}; {results['machine']}."
    return "\n".join([*lines, "", made, *_by_fault(results["files"]), ""])


def machine() -> str:
    """The processor that the seconds are of."""
    cpus = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else []
    return f"one core of {models[0] if models else platform.machine()}"


def _counted(put: dict[str, str] | None) -> str:
    if not put:
        return "not measured"
    said = list(put.values())
    return f"{said.count('healed')} + {said.count('reported')} / {len(said)}"


def _by_fault(files: dict[str, Any]) -> list[str]:
    """A line for each fault: what became of it in each file."""
    columns = {name: row["faults"] for name, row in files.items() if row.get("faults")}
    if not columns:
        return []
    names = list(dict.fromkeys(name for put in columns.values() for name in put))
    known = ("healed", "reported")
    rows = [[put.get(name, "") for put in columns.values()] for name in names]
    told = [[said if said in known else "missed" if said else "-" for said in row] for row in rows]
    return [
        "",
        "Each fault: *healed*, and the tokenizer encodes as before; *reported*, where only a person can tell what is",
        "right, and the tokenizer stays as it is; *-* where the file's kind cannot have it.",
        "",
        f"| fault | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name.replace('|', chr(92) + '|')} | {' | '.join(row)} |" for name, row in zip(names, told, strict=True)),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizers.json and tokenizers.md")
    parser.add_argument("--only", choices=FILES, action="append", help="one file; may be given several times")
    parser.add_argument("--faults", action="store_true", help="also put every fault in")
    options = parser.parse_args()
    os.environ["TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"] = "true"
    path = options.out / "tokenizers.json"
    results = json.loads(path.read_text()) if path.exists() else {"files": {}}
    results |= {"python": platform.python_version(), "packages": {name: version_of(name) for name in PACKAGES}}
    results["machine"] = machine()
    for version in options.only or FILES:
        row = results["files"].setdefault(version, {})
        row |= {"faults": faults(version)} if options.faults else compare(version)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=True) + "\n")
        (options.out / "tokenizers.md").write_text(table(results))
        print(version, {key: value for key, value in row.items() if isinstance(value, int | float)}, flush=True)


if __name__ == "__main__":
    main()
