"""Makes timm know this package's architecture, whichever of the two is imported first.

timm takes seconds to import, so nothing here imports it: what is missing is done right after somebody does.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OURS = "scala_cli.models.registered"


class AfterTimm(MetaPathFinder):
    """Finds timm as Python does, and registers the architecture once timm is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns the spec of timm, whose loader goes on to register; None for all other modules."""
        spec = PathFinder.find_spec(name, path) if name == "timm" else None
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            import_module(OURS)

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers the architecture now if timm is imported, else once it is."""
    if "timm" in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, AfterTimm())
