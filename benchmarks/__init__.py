"""Measured claims: each module prints its tables and writes its section of docs/benchmarks.md.

Run as ``python -m benchmarks.packs`` and ``python -m benchmarks.utilisation``, from the repository's root, on
a machine that does nothing else. Not part of the tests.
"""
