"""What only a machine with a GPU can show, in one command below eight minutes: `make gpu-check`.

Nothing is installed and nothing is fetched: lossray runs from the source tree, in the Python that is there.
Each part is a process with a time limit of its own, so that no part stops or hides another. What is measured
is written as it comes into a folder, from which the section of docs/benchmarks.md is made.
"""
