"""One adapter a host: translate its configuration, call the phases. Loaded by name, never imported by the core."""
