"""A training benchmark that anyone can rerun: contenders beside each other in one run, one process each.

    models.py         random-weight models of named shapes, NF4 or bf16, as checkpoints that from_pretrained loads
    workloads.py      what is trained: rows, lengths, adapters, optimizer (data)
    contenders.py     who trains: stock, Liger, Axolotl, Unsloth, ours with its options (data)
    rows.py           the token ids of a workload and the adapters' first weights, the same for every contender
    loading.py        a contender's model, as its users load it
    clock.py          seconds, losses and memory of each step
    trainer_runs.py   training through TRL's SFTTrainer
    plain_runs.py     training in a plain loop: one long row, growing batches
    axolotl_runs.py   training through ``axolotl train``, with axolotl_clock.py inside of it
    measure.py        one contender, one workload -> JSON lines
    run.py            the suite: rounds, processes, slices, results.json
    results.py        the file of results: keys, medians
    bars.py           what we set out to reach (data)
    judge.py          losses against stock's, figures against the bars
    report.py         training.md;  plots.py its pictures
    profile_step.py   kernel time of one step by phase;  kernel_phases.py which kernel belongs to which phase

Run it with ``python -m integration_tests.benchmarks.training.run --out DIR`` in the root of the repository.
"""
