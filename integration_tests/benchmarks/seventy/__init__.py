"""A model of 70B parameters in NF4 under FSDP2, whose layers no GPU of 80 GB could keep: ours beside stock.

``model`` builds it on the device, so that no checkpoint is written or read; ``train`` is one process of one contender;
``report`` compares losses and writes the page; running the package measures the contenders one after the other.
"""
