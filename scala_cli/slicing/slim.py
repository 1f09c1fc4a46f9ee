"""Token slimming in numbers (SiT, arXiv 2111.12624): which blocks pass on how many tokens, and from where."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from scala_cli.errors import PointError

LEAK = 0.05
"""What of the pooling at the start is spread over all tokens, so that each can still be learnt."""


def slim_counts(stages: Sequence[int], keep: Fraction, patches: int, depth: int) -> dict[int, int]:
    """Returns {block: patch tokens that it passes on}, for the last block of each stage but the last one.

    After stage i of N patches int(N * keep^i) tokens go on, as in the paper.

    Args:
        stages: how many blocks each has.

    Raises PointError for stages that are not all of the blocks, and where no token would be left.
    """
    if not stages or min(stages) < 1 or sum(stages) != depth:
        raise PointError(
            f"stages {','.join(map(str, stages))} have {sum(stages)} blocks, the model has {depth}.",
            "Give each stage one block or more, all of them together as many as the model has.",
            remedy="example",
            setting="stages",
            value=",".join(map(str, default_stages(depth))),
        )
    if not 0 < keep <= 1 or int(patches * keep ** (len(stages) - 1)) < 1:
        raise PointError(
            f"a share of {float(keep):g} leaves none of {patches} tokens after {len(stages) - 1} stages.",
            "Keep more, or have fewer stages.",
            remedy="example",
            setting="slim-keep",
            value="0.5",
        )
    ends = [*accumulate(stages)][:-1]
    return {end - 1: int(patches * keep**stage) for stage, end in enumerate(ends, 1)}


def tokens_of_blocks(counts: Mapping[int, int], patches: int, depth: int) -> list[int]:
    """Returns how many patch tokens each block passes on, for counts as `slim_counts` gives them."""
    passed, tokens = patches, []
    for number in range(depth):
        passed = counts.get(number, passed)
        tokens.append(passed)
    return tokens


def parse_stages(text: str) -> tuple[int, ...]:
    """The stages of "3,3,3,3". Raises PointError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PointError(
            f"{text[:40]!r} are no stages.", remedy="example", setting="stages", value="3,3,3,3"
        ) from None


def default_stages(depth: int) -> tuple[int, ...]:
    """Returns four stages, one block longer at first if they cannot be equal; fewer of few blocks."""
    count = min(4, depth)
    return tuple(depth // count + (stage < depth % count) for stage in range(count))


def pooling(tokens: int, grid: tuple[int, int] | None, given: int) -> Tensor:
    """Returns (tokens, given): means of neighbours, each row of weights adding up to one.

    Args:
        grid: rows and columns, where the given tokens are patches row by row. They are taken in Z-order
            (Morton), in which neighbours are neighbours in the image, and come out in it. None: they are in
            that order already.
    """
    weights = torch.nn.functional.adaptive_avg_pool1d(torch.eye(given)[None], tokens)[0].T
    if grid is None:
        return weights
    places = [interleaved(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return weights[:, torch.tensor(places).argsort().argsort()]


def interleaved(row: int, column: int) -> int:
    """Returns the number whose bits are those of the column and the row in turn."""
    return sum(((column >> bit & 1) | (row >> bit & 1) << 1) << 2 * bit for bit in range(16))


def logits_of(weights: Tensor) -> Tensor:
    """Returns what softmax turns into these weights, but for LEAK."""
    return ((1 - LEAK) * weights + LEAK / weights.shape[-1]).log()
