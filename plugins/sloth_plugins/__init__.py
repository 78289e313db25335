"""The built-in plugins of sloth_backend, one capability each; ``sloth_backend.manager.BUILTIN`` lists them."""
