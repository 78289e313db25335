"""The calls that test and time the larger ops, one file an op."""
