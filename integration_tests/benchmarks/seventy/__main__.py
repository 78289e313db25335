"""Train a 70B model in NF4 under FSDP2 on the GPUs of this machine: stock, ours, and stock in float32, by which
rounding is measured, one after the other, each under a torchrun.

Prints progress with times; writes OUT/seventy.json after each contender, and the page from it with --page (with
--contenders "": the page alone). What the file holds of other contenders stays. Ends with 1 where losses differ, and as
loudly as it can where a contender fails or takes longer than --limit seconds.

usage: python -m integration_tests.benchmarks.seventy --out DIR [--contenders stock,sloth,stock-fp32] [--gpus 2]
           [--page FILE] [--layers 80] [--rows 2] [--length 2048] [--accumulation 4] [--steps 4] [--budget GIB] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from integration_tests.benchmarks.seventy import report
from integration_tests.benchmarks.seventy.train import add_sizes
from integration_tests.benchmarks.training import contenders, run
from integration_tests.benchmarks.training.contenders import CONTENDERS
from integration_tests.child import GRACE

PACKAGE = "integration_tests.benchmarks.seventy"
PASSED_ON = ("layers", "rank", "rows", "length", "accumulation", "steps", "warmup", "budget", "timeout", "limit")


def measured(contender: str, options: argparse.Namespace) -> report.Result:
    """What a contender's first process wrote.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    file = options.out / f"{contender}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += [
        "--nproc_per_node",
        str(options.gpus),
        "-m",
        f"{PACKAGE}.train",
        contender,
        "--out",
        str(file.resolve()),
    ] + ["--tiny"] * options.tiny
    given = ((name, getattr(options, name)) for name in PASSED_ON)
    command += [f"--{name}={value}" for name, value in given if value is not None]
    around = run.environment(run.Settings(), CONTENDERS[contender].kind)
    started = subprocess.Popen(command, env=around, cwd=run.ROOT, start_new_session=True)
    how = run.ending(started, options.limit + GRACE)  # it ends itself before, and says where it was
    if started.returncode or not file.exists():
        raise RuntimeError(f"{contender} {how}; its output is above")
    return json.loads(file.read_text())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of seventy.json")
    parser.add_argument("--contenders", type=contenders.names, default=["stock", "sloth", "stock-fp32"])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--page", type=Path, help="the file to write the page to")
    add_sizes(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, judge, report."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {result["contender"]: result for result in report.load(options.out)}
    for contender in options.contenders:
        results.pop(contender, None)
        results[contender] = measured(contender, options)
        report.save(options.out, report.judged(list(results.values())))
    found = report.load(options.out)
    for result in found:
        print(
            f"{result['contender']}: {result['step_seconds']} s a step, {result['tokens_per_second']} tok/s, losses "
            f"{result['losses']}, from stock {result['distance']}, from float32 {result['from_truth']}, allowed "
            f"{result.get('allowed')}",
            flush=True,
        )
    if options.page is not None:
        options.page.write_text(report.page(found).rstrip() + "\n")
    return int(not report.agrees(found))


if __name__ == "__main__":
    sys.exit(main())
