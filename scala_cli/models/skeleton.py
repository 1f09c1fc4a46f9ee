"""Models without weights: what timm builds for its shapes alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NothingToFill(TorchFunctionMode):
    """Passes over what would fill a tensor that has no memory.

    On the meta device torch finds the shape of some of these calls' results in Python, which would take
    three quarters of the time in which a model is built.
    """

    FILLS = frozenset({"uniform_", "normal_", "erfinv_", "clamp_"})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if args and func.__name__ in self.FILLS:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built within are skeletons, on the meta device: they cost no memory and hardly any time."""
    with torch.device("meta"), NothingToFill():
        yield
