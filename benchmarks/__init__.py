"""Benchmarks: each compares with a plain reference in the same run and checks before it times."""

import time

BEGAN = time.monotonic()  # before torch is imported, which can take a minute from a cold disk
