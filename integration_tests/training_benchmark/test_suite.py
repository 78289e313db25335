"""The training benchmark end to end on a CPU: tiny models, stock and ours, judged and reported."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from integration_tests.benchmarks.training import (
    contenders,
    judge,
    loading,
    measure,
    models,
    profile_step,
    report,
    results,
    rows,
    run,
)
from integration_tests.benchmarks.training import workloads as work
from integration_tests.benchmarks.training.contenders import CONTENDERS
from sloth_backend.budget import SPARE_SHARE

TRAINED = ("full", "finetune", "ctx")


def in_this_process(job: run.Job, settings: run.Settings) -> list[results.Result]:
    """``run.launch`` without the seconds that a child takes to import."""
    folder = run.ensure_model(settings, work.get(job.workload))
    scale = settings.tiny, settings.steps, job.budget_gb
    found = measure.measure(job.contender, job.workload, folder, list(job.points), *scale)
    return [{**result, "round": job.round} for result in found]


def arguments(out: Path, models_in: Path, *others: str) -> list[str]:
    scale = ["--scale", "tiny", "--steps", "2", "--rounds", "1", "--only", ",".join(TRAINED)]
    return ["--out", str(out), "--work", str(models_in), *scale, "--contenders", "stock,sloth", *others]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    folder = tmp_path_factory.mktemp("models")
    for name in TRAINED:
        workload = work.get(name)
        target = folder / models.folder_name(workload.model, workload.nf4, tiny=True)
        if not models.is_written(target):
            models.write(workload.model, target, workload.nf4, tiny=True)
    return folder


@pytest.fixture(scope="module")
def measured(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished suite."""
    out = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "launch", in_this_process)
        assert run.main(arguments(out, written)) == 0
    return out


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    """One's own copy of it, to spoil."""
    return Path(shutil.copytree(measured, tmp_path / "suite"))


def test_every_point_is_a_result(measured: Path) -> None:
    found = results.load(measured)["results"]
    points = {name: work.get(name, tiny=True).points for name in TRAINED}
    assert len(found) == 2 * sum(map(len, points.values()))
    for result in found:
        assert result["status"] == "ok", result
        assert len(result["losses"]) == len(result["all_seconds"]) == 2
        assert result["step_seconds"] == result["all_seconds"][-1] > 0
        assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert any("rms_norm" in line for r in found if r["contender"] == "sloth" for line in r["findings"])


def test_tokens_per_second_count_every_micro_batch(measured: Path) -> None:
    (result, *_) = [r for r in results.load(measured)["results"] if r["workload"] == "full"]
    assert result["tokens_per_second"] == pytest.approx(2 * 2 * 64 / result["step_seconds"], rel=1e-3)


def test_losses_are_stock_s(measured: Path) -> None:
    verdicts = judge.judge_losses(results.load(measured))
    assert {verdict.verdict for verdict in verdicts} == {"equal"}
    assert {verdict.reference for verdict in verdicts} == {"stock"}


def test_a_planted_wrong_loss_fails_the_suite(copied: Path) -> None:
    suite = results.load(copied)
    planted = next(result for result in suite["results"] if result["contender"] == "sloth")
    planted["losses"][1] += 0.05
    results.save(copied, suite)
    assert run.finish(copied) == 1
    assert "differs" in (copied / report.PAGE).read_text()


def test_the_page_and_its_pictures(measured: Path) -> None:
    page = (measured / report.PAGE).read_text()
    for expected in (
        "## full: batch 2 x 4",
        "## finetune",
        "## ctx",
        "| sloth_backend |",
        "not measured",
        "## Versions",
    ):
        assert expected in page
    for picture in ("training.png", "training-length.png"):
        assert f"({picture})" in page
        assert (measured / picture).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_repeats_nothing_and_keeps_the_file(
    copied: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "launch", lambda job, settings: pytest.fail(f"{job} was run again"))
    before = results.load(copied)["results"]
    assert run.main(arguments(copied, written)) == 0
    assert results.load(copied)["results"] == before


def test_a_failed_run_is_tried_again_and_the_others_are_kept(
    copied: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = results.load(copied)
    suite["results"][0]["status"] = "timeout"
    results.save(copied, suite)
    asked: list[run.Job] = []
    monkeypatch.setattr(run, "launch", lambda job, settings: asked.append(job) or in_this_process(job, settings))
    run.main(arguments(copied, written))
    assert [(job.workload, job.contender) for job in asked] == [("full", "stock")]
    assert len(results.load(copied)["results"]) == len(suite["results"])


def test_a_child_measures_and_one_that_takes_too_long_is_ended(written: Path) -> None:
    job = run.Job("ctx", "stock", 3, ((1, 64),))
    (good,) = run.launch(job, run.Settings(written, tiny=True, steps=2))
    assert (good["status"], good["round"], len(good["losses"])) == ("ok", 3, 2)
    (late,) = run.launch(job, run.Settings(written, tiny=True, timeout=0.2))
    assert (late["status"], late["batch"], late["length"]) == ("timeout", 1, 64)


def test_what_a_child_finished_counts_however_it_ends() -> None:
    job = run.Job("ctx", "stock", 0, ((1, 4096), (1, 8192)))
    done = {"workload": "ctx", "contender": "stock", "batch": 1, "length": 4096, "status": "ok"}
    log = f"noise\n{measure.MARK}{json.dumps(done)}\ntorch.OutOfMemoryError: CUDA out of memory"
    assert [(r["length"], r["status"]) for r in run.collect(job, log, "ended with 1")] == [(4096, "ok"), (8192, "oom")]
    assert [r["status"] for r in run.collect(job, "", "ended with -9")] == ["error", "error"]


def test_contenders_are_interleaved_and_the_truth_runs_once() -> None:
    who = ["stock", "stock-fp32", "sloth"]
    todo = list(run.jobs({"results": []}, ["full", "ctx"], who, 2, False))
    order = [(j.workload, j.round, j.contender) for j in todo]
    assert order[:5] == [("full", 0, name) for name in who] + [("full", 1, "stock"), ("full", 1, "sloth")]
    points = {j.contender: j.points for j in todo if j.workload == "ctx"}
    assert points["stock-fp32"] == ((1, 4096), (1, 8192), (1, 16384), (1, 32768))
    assert len(points["stock"]) == 5


# Within another's memory ----------------------------------------------------------------------------------------------


def liger(round_: int, peak: float, **others: object) -> results.Result:
    name = {"workload": "finetune", "contender": "liger", "round": round_, "batch": 2, "length": 64, "status": "ok"}
    figures = {"step_seconds": 1.0, "tokens_per_second": 1.0, "reserved_gib": peak, "base_gib": 1.0, "losses": [1.0]}
    return {**name, **figures, "peak_gib": peak, **others}


def as_liger(out: Path, written: Path) -> list[str]:
    scale = ["--scale", "tiny", "--steps", "2", "--rounds", "1", "--only", "finetune"]
    return ["--out", str(out), "--work", str(written), *scale, "--contenders", "sloth-as-liger"]


def test_without_the_other_s_result_it_waits_and_says_so(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "launch", lambda job, settings: pytest.fail(f"{job} has no budget"))
    results.save(tmp_path, {"results": [{**liger(0, 3.0), "status": "oom"}], "absent": {}})
    assert run.main(as_liger(tmp_path, written)) == 0
    assert "finetune round 0 sloth-as-liger: waits for a result of liger" in capsys.readouterr().out
    assert "waits for a result of liger" in (tmp_path / report.PAGE).read_text()


def test_its_budget_is_the_other_s_latest_peak(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[run.Job] = []
    monkeypatch.setattr(run, "launch", lambda job, settings: asked.append(job) or in_this_process(job, settings))
    others = [liger(1, 2.5), {**liger(2, 9.0), "status": "error"}, {**liger(3, 7.0), "workload": "lora16"}]
    waiting = {"sloth-as-liger": "waits for a result of liger"}
    results.save(tmp_path, {"results": [liger(0, 3.0), *others], "absent": waiting})
    run.main(as_liger(tmp_path, written))
    suite = results.load(tmp_path)
    (mine,) = [result for result in suite["results"] if result["contender"] == "sloth-as-liger"]
    # With it, a plan may take what the other took.
    budget = pytest.approx(2.5 * (1 - run.MISJUDGED) / (1 - SPARE_SHARE) + contenders.DRIVER_GIB, abs=1e-3)
    assert [job.budget_gb for job in asked] == [budget]
    assert (mine["status"], mine["budget_gb"]) == ("ok", budget)
    assert "sloth-as-liger" not in suite["absent"]


def test_the_budget_reaches_the_run() -> None:
    contender = contenders.CONTENDERS["sloth-as-liger"]
    assert contender.with_budget(3.1).options == {"vram_budget_gb": 3.1}
    assert contenders.CONTENDERS["sloth"].with_budget(3.1).options == {}
    with pytest.raises(ValueError, match="needs a budget"):
        next(measure.measure("sloth-as-liger", "finetune", Path(), [(2, 64)], tiny=True))


def test_a_child_is_told_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    job = run.Job("finetune", "sloth-as-liger", 0, ((2, 64),), 3.1)
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(measure, "measure", lambda *arguments: told.append(arguments) or [])
    monkeypatch.setattr("sys.argv", run.measuring(job, Path("model"), run.Settings(tiny=True, steps=1))[2:])
    measure.main()
    assert told == [("sloth-as-liger", "finetune", Path("model"), [(2, 64)], True, 1, 3.1)]


def test_it_runs_after_the_other_and_only_where_bars_ask_for_it() -> None:
    order = list(run.jobs({"results": []}, ["full", "lora16", "finetune"], contenders.names("all"), 1, False))
    assert [job.workload for job in order if job.contender == "sloth-as-liger"] == ["lora16", "finetune"]
    names = [job.contender for job in order if job.workload == "lora16"]
    assert names.index("liger") < names.index("sloth-as-liger")


def test_what_is_not_installed_is_said(tmp_path: Path) -> None:
    assert run.split_absent(["unsloth"], {}) == ([], {"unsloth": "unsloth is not installed"})
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").touch()
    assert run.split_absent(["unsloth"], {"unsloth": str(tmp_path)}) == (["unsloth"], {})


@pytest.mark.parametrize("parse", [work.names, contenders.names])
def test_unknown_names_are_refused_with_the_known_ones(parse: object) -> None:
    with pytest.raises(ValueError, match=r"unknown (workload|contender) '?fulll"):
        parse("fulll")  # type: ignore[operator]


def test_the_truth_computes_what_stock_does(written: Path) -> None:
    """Beside rounding, also where its products are TF32: which a CPU has not, so only the setting is looked at."""
    ids = torch.arange(2 * 33).view(2, 33)
    folder = written / models.folder_name("llama-1b", False, True)
    stock, truth = (loading.base_model(CONTENDERS[name], folder).float() for name in ("stock", "stock-fp32"))
    with torch.no_grad():
        torch.testing.assert_close(truth(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
        loading.multiply_in_tf32(truth)
        during: list[str] = []
        truth.model.rotary_emb.register_forward_pre_hook(lambda *_: during.append(torch.get_float32_matmul_precision()))
        truth(ids)
    found = during[0], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert found == ("highest", "high")


def test_adapters_start_alike_whatever_the_generator_says(written: Path) -> None:
    from peft import get_peft_model

    from integration_tests.benchmarks.training import loading

    def adapters(seed: int) -> dict[str, torch.Tensor]:
        folder = written / models.folder_name("llama-1b", False, True)
        torch.manual_seed(seed)
        model = get_peft_model(loading.base_model(contenders.CONTENDERS["stock"], folder), loading.lora_config(4))
        assert rows.start_adapters(model) == 2 * 2 * 7
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    first, second = adapters(0), adapters(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    values = [tensor for name, tensor in first.items() if "lora_A" in name]
    assert not torch.equal(values[0], values[1])
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)


@pytest.mark.parametrize("name", models.SHAPES)
def test_every_shape_is_a_model_of_transformers(name: str) -> None:
    from transformers import AutoModelForCausalLM

    for tiny in (False, True):
        config = models.shape(name, tiny).config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.get_input_embeddings().weight.shape == (config.vocab_size, config.hidden_size)


@pytest.mark.parametrize("name", ["full", "ctx"])
def test_a_profile_traces_one_step(name: str, written: Path, tmp_path: Path) -> None:
    """Without a GPU there is no kernel to see, so the GPU idles for the whole of the step that was timed."""
    workload = work.get(name, tiny=True, steps=4)
    folder = written / models.folder_name(workload.model, workload.nf4, tiny=True)
    tracer = profile_step.TRACES[workload.loop]("stock", workload, folder, workload.points[0])
    assert tracer.step == workload.steps
    profile_step.write(tmp_path, "profile-stock", tracer)
    sums = json.loads((tmp_path / "profile-stock.json").read_text())
    assert sums["step_seconds"] == pytest.approx(tracer.seconds)
    assert tracer.seconds > 0
    assert (sums["idle_share"], sums["launches"]) == (1, 0)
    assert ("batch_seconds" in sums) == (workload.loop == "trainer")
    assert 0 <= sums.get("batch_seconds", 0) < tracer.seconds
    assert "| phase |" in (tmp_path / "profile-stock.md").read_text()


def test_a_stopwatch_counts_what_is_nested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(profile_step.time, "perf_counter", lambda: next(ticks))
    watch = profile_step.Stopwatch()
    inner = watch.around(lambda: None)
    watch.around(lambda: (inner(), inner()))()
    assert watch.seconds == 3  # from reading 0 to 3; those of the inner calls lie between


def test_alpaca_s_lengths() -> None:
    workload = work.get("alpaca")
    sizes = rows.lengths(workload, (2, 2048), 2000)
    assert sorted(sizes)[1000] == pytest.approx(95, abs=6)
    assert [len(row) for row in rows.token_rows(workload, (2, 2048), 128256)] == sizes[: 8 * workload.steps]


def test_frequencies_fall_as_one_over_the_rank() -> None:
    ids = rows.zipf_ids(torch.Generator().manual_seed(0), (1_000_000,), 128256)
    assert rows.FIRST_ID == int(ids.min()) <= int(ids.max()) < rows.LAST_ID
    share = torch.bincount(ids)[rows.FIRST_ID :] / len(ids)
    among = math.log(rows.LAST_ID - rows.FIRST_ID)
    for rank in (1, 2, 10):
        assert float(share[rank - 1]) == pytest.approx(math.log1p(1 / rank) / among, rel=0.03)
