"""Measured claims: each module prints its tables and writes its section of docs/benchmarks.md.

Run as ``python -m benchmarks.packs`` and so on, from the repository's root, on a machine that does nothing
else; ``make benchmarks`` installs the peers and runs all of them. Not part of the tests.
"""
