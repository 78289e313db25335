"""The downstream suites: which tests of which library concern the backend, and which cannot be run or are refused."""

from __future__ import annotations

from dataclasses import dataclass, field

COUNTS = (
    "counts how often PEFT computes an adapted weight; the trial passes that switching on makes are counted too. The "
    "forward after that computes it as often as without us"
)
LAST_DIGITS = (
    "compares LoRA with DoRA to the last digits of float32: LoRA runs on our op, whose sums are in another order, DoRA "
    "on PEFT's code"
)


@dataclass(frozen=True)
class Suite:
    """Tests of one library.

    Attributes:
        library: the distribution whose installed version says which tag is fetched.
        repository: owner and name on GitHub.
        files: the test files, relative to the repository's root.
        keep: the folders and files of the repository that the tests need; never the library itself.
        keyword: what pytest's ``-k`` gets.
        bare: models that PEFT's functions return are switched on, since the tests train them by hand.
        gpus: how many are needed; the tests see no more, where they need any.
        needs_models: whether a run in which no model was switched on is a failure.
        deselected: pattern of a test's id -> why it is not run in any mode.
        refused: pattern of a test's id -> why it does not pass with the backend on.
        environment: variables that the tests need.
    """

    library: str
    repository: str
    files: tuple[str, ...]
    keep: tuple[str, ...] = ("tests",)
    keyword: str = ""
    bare: bool = False
    gpus: int = 0
    needs_models: bool = True
    deselected: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


OTHER_LORAS = (
    "adalora or vblora or randlora or xlora or bdlora or gralora or tinylora or glora or unilora or monteclora"
)
NOT_LORA = "vera or ia3 or road or hira or adaption_prompt or p_tuning or prefix or arrow or hotswap"
NOT_BNB = "gptq or torchao or eetq or hqq or awq or aqlm or seq2seq or t5 or audio or offload or notebook"
OTHER_MODELS = "test_lora_bnb_4bit_quantization or test_lora_bnb_8bit_quantization or test_modules_to_save_grad"
"""Other methods, other quantisers, and models that are no causal language models; scripts beside PEFT's tests."""
BNB = f"(bitsandbytes or bnb) and not ({OTHER_LORAS} or {NOT_LORA} or {NOT_BNB} or {OTHER_MODELS})"
LORA = f"(loraconfig or test_lora or test_target_parameters) and not ({OTHER_LORAS})"
"""pytest compares without case; file names count too."""

ACCELERATE = (
    *("accelerator", "big_modeling", "cpu", "data_loader", "dataclasses", "grad_sync", "hooks", "kwargs_handlers"),
    *("launch", "logging", "memory_utils", "metrics", "modeling_utils", "offload", "optimizer", "scheduler"),
    *("state_checkpointing", "utils"),
)
"""All but examples, trackers, and what needs other hardware."""

SUITES = {
    "trl-sft": Suite(
        "trl",
        "huggingface/trl",
        ("tests/test_sft_trainer.py",),
        keyword="not TestSFTTrainerSlow and not test_train_with_liger and not ForConditionalGeneration",
    ),
    "peft-lora": Suite(
        "peft",
        "huggingface/peft",
        (
            "tests/test_decoder_models.py",
            "tests/test_lora_variants.py",
            "tests/test_target_parameters.py",
            "tests/test_loraplus.py",
        ),
        keyword=LORA,
        bare=True,
        refused={"*::test_target_parameter_result_caching_works": COUNTS},
    ),
    "peft-bnb": Suite(
        "peft",
        "huggingface/peft",
        ("tests/test_common_gpu.py", "tests/test_gpu_examples.py"),
        keyword=f"{BNB} and not training_multi_gpu",
        bare=True,
        gpus=1,
        refused={"*::test_4bit_dora_inference": LAST_DIGITS},
    ),
    "peft-bnb-two": Suite(
        "peft",
        "huggingface/peft",
        ("tests/test_gpu_examples.py",),
        keyword=f"{BNB} and training_multi_gpu",
        bare=True,
        gpus=2,
    ),
    "trainer-accumulation": Suite(
        "transformers",
        "huggingface/transformers",
        ("tests/trainer",),
        keep=("tests", "conftest.py", "utils"),
        keyword="accumulation",
        environment={"RUN_SLOW": "yes"},
    ),
    "accelerate": Suite(
        "accelerate",
        "huggingface/accelerate",
        tuple(f"tests/test_{name}.py" for name in ACCELERATE),
        needs_models=False,
        environment={"RUN_SLOW": "yes"},
    ),
}
