"""``sloth demo``: a real fine-tuning run from data to loss curve, on any machine, with nothing to download."""
