"""The command line. Until it is known that nothing is missing, nothing is imported that may be."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.requirements import lacking


def main() -> None:
    """Check this machine, or put the results of another into the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="Check a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu-check"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    parser.add_argument("--write", type=Path, help="put the results in this folder into docs/benchmarks.md")
    parser.add_argument("--measure", choices=list(PARTS), help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args()
    if missing := lacking():
        sys.exit("\n".join(f"gpu-check: {line}" for line in missing))
    from benchmarks.gpu_check import check

    if options.measure:
        sys.exit(check.measure(options.measure, options.device, options.out))
    if options.write:
        sys.exit(check.write(options.write))
    sys.exit(check.run_all(options.device, options.out.absolute(), options.only))


if __name__ == "__main__":
    main()
