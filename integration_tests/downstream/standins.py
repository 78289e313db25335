"""Local stand-ins for what downstream suites load from the model hub, for machines without one.

Tiny models with random weights, an adapter and a byte-level tokenizer are written in the layout of the hub's own cache,
so that every library finds them under the hub's names, child processes too; data sets are made in memory. Suites test
shapes, gradients and bookkeeping, not what a model knows, so random weights serve as well as those of the hub, which
are random too. What is not listed here stays missing, and its tests fail as they do without a network.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from collections import Counter
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

SPECIAL = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
COMMIT = "0" * 39 + "1"
"""The revision that the cache claims to hold."""

_LLAMA = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
_DENSE = {**_LLAMA, "intermediate_size": 32, "max_position_embeddings": 2048}
_EXPERTS = {**_DENSE, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_CHUNKED = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 32, "attention_chunk_size": 64}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}
_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 4, "num_hidden_layers": 2}

MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    f"trl-internal-testing/tiny-{name}": (kind, sizes, template)
    for name, kind, sizes, template in (
        ("Qwen2ForCausalLM-2.5", "Qwen2ForCausalLM", _DENSE, "qwen2_5"),
        ("Qwen3ForCausalLM", "Qwen3ForCausalLM", {**_DENSE, "head_dim": 8}, "qwen3"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeForCausalLM", {**_EXPERTS, "num_experts": 4, "head_dim": 8}, "qwen3"),
        ("LlamaForCausalLM-3", "LlamaForCausalLM", _DENSE, "llama3"),
        ("LlamaForCausalLM-3.1", "LlamaForCausalLM", _DENSE, "llama3_1"),
        ("LlamaForCausalLM-3.2", "LlamaForCausalLM", _DENSE, "llama3_2"),
        ("MistralForCausalLM-0.1", "MistralForCausalLM", _DENSE, None),
        ("MistralForCausalLM-0.2", "MistralForCausalLM", _DENSE, None),
        ("GemmaForCausalLM", "GemmaForCausalLM", {**_DENSE, "head_dim": 8}, "gemma"),
        ("Gemma2ForCausalLM", "Gemma2ForCausalLM", {**_DENSE, "head_dim": 8}, "gemma"),
        ("CohereForCausalLM", "CohereForCausalLM", _DENSE, "cohere"),
        ("Cohere2ForCausalLM", "Cohere2ForCausalLM", _DENSE, "cohere2"),
        ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLM", {**_EXPERTS, **_LATENT, **_ROUTED}, "deepseekv3"),
        ("DeepseekV3ForCausalLM-0528", "DeepseekV3ForCausalLM", {**_EXPERTS, **_LATENT, **_ROUTED}, "deepseekv3"),
        ("Glm4MoeForCausalLM", "Glm4MoeForCausalLM", {**_EXPERTS, **_ROUTED, "head_dim": 8}, "glm4moe"),
        ("GPTNeoXForCausalLM", "GPTNeoXForCausalLM", _DENSE, None),
        ("GptOssForCausalLM", "GptOssForCausalLM", {**_EXPERTS, "num_local_experts": 4, "head_dim": 8}, "gptoss"),
        ("Llama4ForCausalLM", "Llama4ForCausalLM", {**_EXPERTS, **_CHUNKED}, None),
        ("Phi3ForCausalLM", "Phi3ForCausalLM", {**_DENSE, "pad_token_id": 0}, "phi3"),
        ("Olmo3ForCausalLM", "Olmo3ForCausalLM", {**_DENSE, "num_hidden_layers": 4}, None),
        ("LlamaForSequenceClassification-3.2", "LlamaForSequenceClassification", _DENSE, "llama3_2"),
        ("random-LlamaForCausalLM", "LlamaForCausalLM", {**_DENSE, "num_key_value_heads": 4}, None),
    )
}
MODELS["Qwen/Qwen3-4B"] = MODELS["trl-internal-testing/tiny-Qwen3ForCausalLM"]
# 64 wide: blocks of bitsandbytes' 4-bit weights fill rows.
_OPT_125M = {**_OPT, "num_hidden_layers": 12, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
_OPT_350M = {**_OPT_125M, "num_hidden_layers": 4, "do_layer_norm_before": False}
_OPT_125M_OF_THE_HUB = {
    **_OPT_125M,
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "vocab_size": 50272,
    "dtype": "float16",
}
_BLOOM_560M = {"hidden_size": 1024, "n_head": 16}
_GEMMA3 = {**_DENSE, "head_dim": 8, "sliding_window": 64}
MODELS |= {
    name: (kind, sizes, None)
    for name, kind, sizes in (
        ("peft-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", _OPT),
        ("peft-internal-testing/opt-125m", "OPTForCausalLM", _OPT_125M_OF_THE_HUB),
        ("facebook/opt-125m", "OPTForCausalLM", _OPT_125M),
        ("facebook/opt-350m", "OPTForCausalLM", _OPT_350M),
        ("facebook/opt-6.7b", "OPTForCausalLM", {**_OPT_125M, "num_hidden_layers": 32, "vocab_size": 50272}),
        ("bigscience/bloomz-560m", "BloomForCausalLM", _BLOOM_560M),
        ("openai-community/gpt2", "GPT2LMHeadModel", {**_GPT2, "n_embd": 64}),
        ("gpt2", "GPT2LMHeadModel", {**_GPT2, "n_embd": 64}),
        ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", {**_DENSE, "hidden_size": 64}),
        ("peft-internal-testing/tiny-random-gpt2", "GPT2LMHeadModel", _GPT2),
        ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", _GPT2),
        ("hf-internal-testing/tiny-random-gpt2", "GPT2LMHeadModel", _GPT2),
        ("peft-internal-testing/tiny-random-GPTJForCausalLM", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
        ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM", "GPTNeoXForCausalLM", _DENSE),
        ("peft-internal-testing/tiny-random-BloomForCausalLM", "BloomForCausalLM", {"hidden_size": 32, "n_head": 4}),
        ("peft-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", _DENSE),
        ("hf-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", _DENSE),
        ("hf-internal-testing/tiny-random-MistralForCausalLM", "MistralForCausalLM", _DENSE),
        ("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", _DENSE),
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM", "Gemma3ForCausalLM", _GEMMA3),
        ("peft-internal-testing/tiny-random-BertModel", "BertModel", {**_DENSE, "num_attention_heads": 4}),
        ("nickypro/tinyllama-15M", "LlamaForCausalLM", _DENSE),
        ("nickypro/tinyllama-110M", "LlamaForCausalLM", _DENSE),
        ("hf-internal-testing/tiny-random-BertModel", "BertModel", _DENSE),
        ("roneneldan/TinyStories-33M", "GPTNeoForCausalLM", {"hidden_size": 32, "num_layers": 2, "num_heads": 4}),
    )
}
"""Name on the hub -> class, fields of its configuration, and the chat template of TRL's that its tokenizer has.

Names and classes are those of the libraries' tests (TRL 1.9, PEFT 0.20, transformers 5.16); the sizes are ours, but
for a model whose parameters PEFT's tests count."""
MODELS["roneneldan/TinyStories-33M"][1]["attention_types"] = [[["global", "local"], 1]]
DECIDED = {"peft-internal-testing/opt-125m": 5.0}
"""Name -> how much larger its embeddings are: tests look at probabilities, and want to see what an adapter changes."""
ADAPTERS = {"ybelkada/test-st-lora": "facebook/opt-350m"}
"""Name on the hub -> the model that the adapter is for."""


def digest() -> str:
    """Differs where the stand-ins do."""
    return f"{zlib.crc32(repr((MODELS, DECIDED, ADAPTERS)).encode()):08x}"


def write(folder: Path) -> None:
    """Write what is not in ``folder`` yet; ``HF_HUB_CACHE`` then makes a process load from there."""
    for name in (*MODELS, *ADAPTERS):
        place = folder / f"models--{name.replace('/', '--')}"
        if not (place / "refs" / "main").exists():
            (_write_adapter if name in ADAPTERS else _write)(name, place / "snapshots" / COMMIT)
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs" / "main").write_text(COMMIT)


def _write(name: str, folder: Path) -> None:
    import torch

    template = MODELS[name][2]
    tokenizer = _tokenizer()
    tokenizer.chat_template = _template(template)
    tokenizer.save_pretrained(folder)
    model = _model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(DECIDED.get(name, 1.0))
    model.save_pretrained(folder)


def _model(name: str) -> Any:
    """With random weights, the same in each call."""
    import torch
    import transformers

    kind, sizes, _ = MODELS[name]
    cls, tokenizer = getattr(transformers, kind), _tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = cls.config_class(**{"vocab_size": len(tokenizer), **ids, **sizes})
    torch.manual_seed(0)
    return cls(config).to(getattr(torch, sizes.get("dtype", "float32")))


def _write_adapter(name: str, folder: Path) -> None:
    """LoRA on what PEFT takes for the model's class."""
    from peft import LoraConfig, get_peft_model

    base = ADAPTERS[name]
    model: Any = get_peft_model(_model(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)


@cache
def _tokenizer() -> Any:
    """Byte-level BPE with the special tokens that chat templates write; no token is put before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(_TEXTS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _template(name: str | None) -> str | None:
    """A chat template as the installed TRL has it, which its tests look up by its text."""
    spec = find_spec("trl") if name else None
    if spec is None or spec.origin is None:
        return None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


_TEXTS = [
    "A sloth hangs from a branch.",
    "It sleeps for most of the day.",
    "Leaves are its only food, and they take long to digest.",
    "Moss grows in its fur.",
    "Now and then it climbs down.",
    "Nobody knows why it does so.",
    "The way back up takes half an hour.",
    "What is slow is seldom seen.",
    "An eagle sees it all the same.",
    "Three toes on each foot hold fast.",
    "Swimming is what it does best.",
    "Its neck turns further than an owl's.",
    "Rain does not disturb it.",
    "Two of them in one tree are a crowd.",
    "Young ones ride on their mother.",
    "A week passes before it comes down again.",
    "Then everything starts over.",
]


def _rows(config: str | None) -> list[dict[str, Any]]:
    """Rows in the format that ``config`` names, as TRL calls its formats."""
    kind = config or "standard_language_modeling"
    chat = not kind.startswith("standard")
    rows = []
    for text in _TEXTS:
        head, _, tail = text.rpartition(" ")
        user, answer = {"role": "user", "content": head}, {"role": "assistant", "content": tail}
        if "prompt_completion" in kind:
            rows.append({"prompt": [user], "completion": [answer]} if chat else {"prompt": head, "completion": tail})
        elif "preference" in kind:
            rows.append({"chosen": text, "rejected": f"{head} never."})
        else:
            rows.append({"messages": [user, answer]} if chat else {"text": text})
    return rows


def _tool_rows(config: str | None) -> list[dict[str, Any]]:
    """Conversations in which the assistant calls a tool, with the schemas in JSON."""
    parameters = {"type": "object", "properties": {"tree": {"type": "string"}}, "required": ["tree"]}
    function = {"name": "count", "description": "Count the sloths in a tree.", "parameters": parameters}
    call = {"type": "function", "function": {"name": "count", "arguments": {"tree": "cecropia"}}}
    messages = [
        {"role": "user", "content": "How many are there?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "2", "tool_calls": None, "name": "count"},
        {"role": "assistant", "content": "There are two.", "tool_calls": None, "name": None},
    ]
    tools = json.dumps([{"type": "function", "function": function}])
    return [{"messages": messages, "tools": tools} for _ in _TEXTS]


def _harmony_rows(config: str | None) -> list[dict[str, Any]]:
    """Conversations in the format of gpt-oss."""
    extra = {"reasoning_effort": "low", "model_identity": "You are Tiny."}
    return [{**row, **extra} for row in _rows(config)]


DATASETS = {
    "trl-internal-testing/zen": _rows,
    "trl-internal-testing/toolcall": _tool_rows,
    "trl-internal-testing/harmony": _harmony_rows,
    "stanfordnlp/imdb": lambda config: [{**row, "label": 0} for row in _rows(None)],
    "wikitext": lambda config: _rows(None) * 8,
    "Salesforce/wikitext": lambda config: _rows(None) * 8,
    "Abirate/english_quotes": lambda config: [{"quote": row["text"]} for row in _rows(None)],
    "ybelkada/english_quotes_copy": lambda config: [{"quote": row["text"]} for row in _rows(None)],
}
"""Name on the hub -> rows of one of its configurations."""


def serve_datasets() -> None:
    """Let ``datasets.load_dataset`` answer for ``DATASETS``; the rest goes to the original."""
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, split: Any = None, **options: Any) -> Any:
        if path not in DATASETS:
            return original(path, name, *args, split=split, **options)
        data = _parts(DATASETS[path](name), bool(options.get("streaming")))
        return data if split is None else _slice(data, str(split))

    datasets.load_dataset = load_dataset
    vars(sys.modules["datasets.load"])["load_dataset"] = load_dataset


def _parts(rows: list[dict[str, Any]], streaming: bool) -> Any:
    """The splits of a data set; the last two rows are those of ``test`` and ``validation``."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    parts = {"train": rows, "test": rows[-2:], "validation": rows[-2:]}
    data = DatasetDict({key: Dataset.from_list(part) for key, part in parts.items()})
    return IterableDatasetDict({k: part.to_iterable_dataset() for k, part in data.items()}) if streaming else data


def _slice(data: Any, split: str) -> Any:
    """``train`` or ``train[:40]``, where fewer rows than asked for are all there are."""
    name, _, window = split.partition("[")
    last = window.rstrip("]").removeprefix(":")
    return data[name].select(range(min(int(last), len(data[name])))) if last.isdigit() else data[name]


def train_on_cpu() -> None:
    """Where there is no accelerator, give ``TrainingArguments`` the ``use_cpu`` without which bf16 is refused."""
    import torch
    from transformers import TrainingArguments

    if torch.accelerator.is_available():
        return
    original = TrainingArguments.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        self.use_cpu = True
        original(self)

    TrainingArguments.__post_init__ = __post_init__


def serve_diffusers() -> None:
    """Let PEFT's common test helpers, which import one name of diffusers, be imported where it is not installed."""
    if find_spec("diffusers") is None:
        module = ModuleType("diffusers")
        module.__spec__ = ModuleSpec("diffusers", None)
        vars(module)["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


class AllCached(Counter[str]):
    """What PEFT's tests keep of the models that they need not look for on the hub again: all of them."""

    def __contains__(self, name: object) -> bool:
        return True


def stay_offline() -> None:
    """Keep PEFT's tests, which go online for a name's first use, from waiting for a network; after collection."""
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            vars(module)["_HUB_MODEL_ACCESSES"] = AllCached()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
