"""Kernels of sloth_backend: torch and triton only; nothing here knows of models, adapters or hosts."""
