"""Finds the ViT in a file of any training script, under any keys and prefix."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scala_cli.errors import CheckpointError

State = dict[str, Tensor]
CONTAINERS = (Mapping, list, tuple)
BLOCK, PATCHES = "blocks.0.norm1.weight", "patch_embed."
"""Names that every ViT of timm has; what precedes the first one is a prefix."""
AVERAGE = re.compile(r"(?i)(^|[._ ])(ema|swa|averaged?|teacher|target|momentum)([._,]|$)")
"""Names of the moving average of the weights in training scripts: model_ema, state_dict_ema, teacher."""
USUAL = ("state_dict", "model", "model_state_dict", "module", "net")
"""Keys to look under if no tensor has one of timm's names."""
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""What DistributedDataParallel and torch.compile put before every name."""


@dataclass(frozen=True)
class Candidate:
    """A ViT found in a file.

    Args:
        place: the keys that lead to it and the prefix of its names: "state_dict, model."; "" if none.
        state: its tensors by name, without the prefix.
        left_out: other names in the same dictionary.
    """

    place: str
    state: State
    left_out: tuple[str, ...] = ()

    @property
    def is_average(self) -> bool:
        return AVERAGE.search(self.place) is not None


def find_state(content: Any, average: bool, file: Path) -> tuple[State, list[str]]:
    """Returns the weights in the content of a file, and notes for the user on the choice.

    Args:
        average: take the moving average instead of the weights.

    Raises:
        CheckpointError: if there is no ViT, or several, or no average when `average` is set.
    """
    found = candidates(content)
    wanted = [one for one in found if one.is_average is average]
    if average and not wanted:
        raise no_average(file)
    if not wanted:
        wanted = found
    if not wanted:
        raise CheckpointError(
            f"{file} holds no dictionary of tensors; it holds {keys_of(content)}.",
            "Save the weights alone: torch.save(model.state_dict(), FILE)",
        )
    if len(wanted) > 1:
        raise CheckpointError(
            f"{file} holds several models: {'; '.join(one.place or 'the file itself' for one in wanted)}.",
            "Save the one that you want by itself: torch.save(model.state_dict(), FILE)",
        )
    chosen, notes = wanted[0], []
    others = [one.place for one in found if one.is_average and one is not chosen]
    if others:
        notes.append(f"{file.name} also holds a moving average of the weights ({others[0]}): --ema takes it")
    if chosen.is_average and not average:
        notes.append(f"{file.name} holds a moving average of the weights alone ({chosen.place}); it is taken")
    if chosen.left_out:
        notes.append(f"{file.name}: left out what is not the model's: {examples(chosen.left_out)}")
    return chosen.state, notes


def candidates(content: Any) -> list[Candidate]:
    """Returns all ViTs under timm's names; if there are none, the most likely one under other names."""
    dictionaries = list(walk(content))
    found = [one for place, tensors in dictionaries for one in under_prefixes(place, tensors)]
    if found:
        return found
    whole = [
        Candidate(place, {WRAPPERS.sub("", name): tensor for name, tensor in held.items()})
        for place, held in dictionaries
        if any(name.endswith("weight") for name in held)
    ]
    averages = [one for one in whole if one.is_average]
    for usual in ("", *USUAL):
        if chosen := [one for one in whole if one.place == usual]:
            return chosen + averages
    return whole


def walk(content: Any) -> Iterator[tuple[str, State]]:
    """Yields (keys to it, tensors) of every dictionary that holds named tensors, except an optimizer's.

    A file may hold the same object in several places, even inside itself, at any depth.
    """
    waiting: list[tuple[str, Any]] = [("", content)] if isinstance(content, CONTAINERS) else []
    entered: set[int] = set()
    while waiting:
        place, held = waiting.pop()
        parts = list(held.items() if isinstance(held, Mapping) else enumerate(held))
        tensors = {k: t for k, t in parts if isinstance(k, str) and isinstance(t, Tensor)}
        if tensors:
            yield place, tensors
        if id(held) in entered:
            continue
        entered.add(id(held))
        inside = [(str(key), value) for key, value in parts if isinstance(value, CONTAINERS)]
        waiting += [
            (f"{place}, {key}" if place else key, value)
            for key, value in reversed(inside)
            if "optim" not in key
        ]


def under_prefixes(place: str, tensors: State) -> Iterator[Candidate]:
    """Yields the ViTs with timm's names in one dictionary, one per prefix."""
    for name in tensors:
        prefix = name.removesuffix(BLOCK)
        whole = name.endswith(BLOCK) and (not prefix or prefix.endswith("."))
        if not whole or not any(other.startswith(prefix + PATCHES) for other in tensors):
            continue
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        decoder = {k for k in state if k.startswith("decoder_")}  # of a masked autoencoder
        decoder |= {"mask_token"} & state.keys() if decoder else set()
        beside = [k for k in tensors if not k.startswith(prefix)]
        yield Candidate(
            ", ".join(filter(None, (place, prefix))),
            {k: t for k, t in state.items() if k not in decoder},
            (*beside, *sorted(decoder)),
        )


def no_average(file: Path) -> CheckpointError:
    """Returns the error for a file without a moving average."""
    return CheckpointError(
        f"{file} holds no moving average of weights, as model_ema or state_dict_ema.",
        remedy="leave_out",
        setting="ema",
    )


def keys_of(content: Any) -> str:
    """Returns what a file holds, in words."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return examples([str(key) for key in content]) if content else "nothing"


def examples(names: list[str] | tuple[str, ...]) -> str:
    """Returns the first few names and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
