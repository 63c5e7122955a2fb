"""The parts of the check, in order, and how long each may take."""

import importlib
from dataclasses import dataclass
from types import ModuleType

MARGIN = 15  # seconds before its end at which a part begins nothing more
DRY_TIMES = 10  # how much longer a part may take on a CPU


@dataclass(frozen=True)
class Part:
    """One part."""

    name: str  # of its module in this package, which has TITLE, TEXT and `measure`
    seconds: int  # after which it is stopped, on a GPU

    def limit(self, device: str) -> int:
        """Seconds, on a device."""
        return self.seconds * (DRY_TIMES if device == "cpu" else 1)

    @property
    def module(self) -> ModuleType:
        """Where it is."""
        return importlib.import_module(f"benchmarks.gpu_check.{self.name}")


PARTS = {
    part.name: part
    for part in (
        Part("machine", 20),
        Part("device_tests", 140),
        Part("whole_study", 70),
        Part("memory", 55),
        Part("packs", 55),
        Part("products", 50),
        Part("reports", 55),
        Part("packed_analyses", 25),
    )
}
