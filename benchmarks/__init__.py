"""Benchmarks: each compares with a plain reference in the same run and checks before it times."""
