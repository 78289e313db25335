"""``sloth heal``: what the backend would mend in a model's folder, and a mended copy of it on request.

The tokenizer is loaded whole. Of the model only the input and output embeddings are read, into a model without other
values, so that a 70B checkpoint needs a few GiB. The same hooks run as before a training run. The folder itself is
never written to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sloth_backend import phases
from sloth_backend.config import SlothConfig
from sloth_backend.findings import Finding, Report
from sloth_backend.run import Run

CONFIGS = {"config": "config.json", "generation_config": "generation_config.json"}
ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")
REPLACED = ("special_tokens_map.json", "added_tokens.json")
"""Files of older versions; once the tokenizer is saved, other files hold what they say."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
"""What tokenizers are loaded from; all else only describes them."""


class HealError(Exception):
    """The folder cannot be looked at, or its copy not be written; the message says why and what to do."""


@dataclass
class Patient:
    """A folder and what was found in it.

    Attributes:
        folder: where the model lies.
        tokenizer: as mended.
        model: a causal language model of which only the embeddings have values; None where there is none to look at.
        files: parameter name -> the file that holds it.
        session: the findings.
    """

    folder: Path
    tokenizer: Any
    session: phases.Session = field(repr=False)
    model: Any = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def report(self) -> Report:
        """All findings, with the folder as the run's name."""
        return Report(tuple(self.session.findings), str(self.folder))

    def changed(self, name: str) -> bool:
        """Whether something of this dotted name, or below it, was changed."""
        subjects = [part for f in self.report.of(action="changed") for part in f.subject.split(" = ")]
        return any(subject == name or subject.startswith(f"{name}.") for subject in subjects)


def examine(folder: Path) -> Patient:
    """Run the hooks of healing and of the embedding fix on what lies in ``folder``; nothing is written.

    Raises:
        HealError: no folder, or its tokenizer cannot be loaded.
        SlothPluginError: a plugin failed.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise HealError(f"{folder} is no folder; give the folder of a model, with its tokenizer's files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # half a folder, damaged files, a class that is code: each in words of its own
        raise HealError(f"the tokenizer in {folder} cannot be loaded: {_cause(folder, error)}") from error
    session = phases.begin(Run("user", SlothConfig(print_report=False)))
    patient = Patient(folder, tokenizer, session)
    phases.before_data(session, tokenizer)
    _look_at_model(patient)
    return patient


def _look_at_model(patient: Patient) -> None:
    session = patient.session
    if not (patient.folder / CONFIGS["config"]).is_file():
        session.findings.append(_skipped("there is no config.json: the model was not looked at"))
        return
    try:
        patient.model = _without_values(patient.folder)
        patient.files = _read_embeddings(patient)
    except Exception as error:  # architectures that are code or unknown here, damaged files
        patient.model = None
        session.findings.append(_skipped(f"the model was not looked at: {_first_line(error)}"))
        return
    found = session.manager.fix_embeddings(patient.model, patient.tokenizer, session.run, session.edits)
    if not patient.files:
        found = [f for f in found if f.capability != "embedding_fix"]
        reason = "no safetensors file here holds its embeddings, so they were not looked at: the weights are missing"
        found.append(Finding("warned", "model", reason, "heal"))
    session.findings += found


def _without_values(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (folder / CONFIGS["generation_config"]).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _read_embeddings(patient: Patient) -> dict[str, Path]:
    """Give the embeddings their values; returns which file each came from."""
    from safetensors import safe_open

    model, where = patient.model, _weight_map(patient.folder)
    taking: Any = model.get_input_embeddings()
    giving: Any = model.get_output_embeddings()
    tied = getattr(giving, "weight", None) is taking.weight
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    read = {}
    for module in (taking,) if tied else (taking, giving):
        name = names.get(module)
        if name not in where:
            continue
        with safe_open(where[name], framework="pt") as file:
            module.weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
        read[name] = where[name]
    if tied:
        giving.weight = taking.weight
    # As it will be when the copy is loaded: the row of an eos that was pad until now counts like any other.
    if patient.tokenizer.pad_token_id not in (None, patient.tokenizer.eos_token_id):
        taking.padding_idx = patient.tokenizer.pad_token_id
    rows, promised = len(taking.weight), taking.num_embeddings
    if rows != promised:
        taking.num_embeddings = rows
        reason = f"the file has {rows} rows, config.json says {promised}: one of them is another model's"
        patient.session.findings.append(Finding("warned", "model.config.vocab_size", reason, "heal"))
    return read


def _weight_map(folder: Path) -> dict[str, Path]:
    """Parameter name -> file, for checkpoints of safetensors."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def write(patient: Patient, out: Path) -> None:
    """Write a copy of the folder with everything mended; it appears under its name once it is complete.

    Args:
        patient: what ``examine`` returned.
        out: a folder that does not exist yet.

    Raises:
        HealError: ``out`` exists, lies in the model's folder, or cannot be written.
    """
    folder, target = patient.folder.resolve(), out.resolve()
    if out.exists():
        raise HealError(f"{out} exists; give --write a new folder, nothing is written over")
    if folder in target.parents:
        raise HealError(f"{out} lies in {patient.folder}, which is left as it is; give --write a folder outside")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".sloth-heal-") as part:
            draft = Path(part) / out.name
            shutil.copytree(folder, draft)
            _write_tokenizer(patient, draft)
            _write_configs(patient, draft)
            _write_embeddings(patient, draft)
            draft.rename(target)
    except OSError as error:
        raise HealError(f"{out} cannot be written: {error}") from error


def _write_tokenizer(patient: Patient, draft: Path) -> None:
    if not patient.changed("tokenizer"):
        return
    for name in REPLACED:
        (draft / name).unlink(missing_ok=True)
    patient.tokenizer.save_pretrained(draft)


def _write_configs(patient: Patient, draft: Path) -> None:
    """The ids that changed, each in its file; all other lines stay as they are."""
    for attribute, name in CONFIGS.items():
        if not patient.changed(f"model.{attribute}"):
            continue
        config, file = getattr(patient.model, attribute), draft / name
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        content |= {key: getattr(config, key) for key in ID_FIELDS if getattr(config, key, None) is not None}
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_embeddings(patient: Patient, draft: Path) -> None:
    """Files that hold a mended matrix are written anew, one at a time."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    mended = {name: file for name, file in patient.files.items() if patient.changed(name)}
    for file in set(mended.values()):
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        tensors = load_file(file)
        tensors |= {name: patient.model.get_parameter(name).data for name in mended if mended[name] == file}
        save_file(tensors, draft / file.name, metadata=metadata)


def _skipped(reason: str) -> Finding:
    return Finding("skipped", "model", reason, "heal")


def _cause(folder: Path, error: Exception) -> str:
    """Why a tokenizer does not load, in words that say what to do where the folder shows it."""
    if "custom code" in str(error):
        return "its class is code that comes with the model, which is never run here"
    if not any(path.name in TOKENIZER_FILES or "tekken" in path.name for path in folder.iterdir()):
        return f"none of its files is there ({', '.join(TOKENIZER_FILES)}); copy those of the model into the folder"
    return f"{_first_line(error)}; if the folder is complete, a file of it is damaged: fetch it anew"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
