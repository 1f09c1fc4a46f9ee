"""Token counts and initial weights of token slimming (SiT, arXiv 2111.12624)."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from scala_cli.errors import PointError

LEAK = 0.05
"""Share of the initial pooling weights spread evenly over all tokens, so that no weight starts at zero."""


def slim_counts(stages: Sequence[int], keep: Fraction, patches: int, depth: int) -> dict[int, int]:
    """Returns {block: patch tokens that it passes on}, for the last block of every stage but the last.

    After stage i, int(N * keep^i) of N patch tokens are left, as in the paper.

    Args:
        stages: the number of blocks in each stage.

    Raises PointError if the stages do not add up to all blocks, or no token would be left.
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
    """Returns how many patch tokens each block passes on.

    Args:
        counts: from `slim_counts`.
    """
    passed, tokens = patches, []
    for number in range(depth):
        passed = counts.get(number, passed)
        tokens.append(passed)
    return tokens


def parse_stages(text: str) -> tuple[int, ...]:
    """Returns the stages of "3,3,3,3". Raises PointError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PointError(
            f"{text[:40]!r} are no stages.", remedy="example", setting="stages", value="3,3,3,3"
        ) from None


def default_stages(depth: int) -> tuple[int, ...]:
    """Returns four stages, the first ones a block longer if they cannot be equal; fewer for few blocks."""
    count = min(4, depth)
    return tuple(depth // count + (stage < depth % count) for stage in range(count))


def pooling(tokens: int, grid: tuple[int, int] | None, given: int) -> Tensor:
    """Returns the weights (tokens, given) of means of neighbouring tokens; each row adds up to one.

    Args:
        tokens: number of tokens going out; they are in Z-order (Morton), in which neighbours are neighbours
            in the image.
        grid: rows and columns, if the tokens coming in are patches row by row; None if they are in Z-order.
        given: number of tokens coming in.
    """
    weights = torch.nn.functional.adaptive_avg_pool1d(torch.eye(given)[None], tokens)[0].T
    if grid is None:
        return weights
    places = [interleaved(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return weights[:, torch.tensor(places).argsort().argsort()]


def interleaved(row: int, column: int) -> int:
    """Returns the Z-order index of a patch: the bits of column and row, interleaved."""
    return sum(((column >> bit & 1) | (row >> bit & 1) << 1) << 2 * bit for bit in range(16))


def logits_of(weights: Tensor) -> Tensor:
    """Returns logits whose softmax is these weights, with LEAK spread evenly."""
    return ((1 - LEAK) * weights + LEAK / weights.shape[-1]).log()
