"""Which guidance branches run through the MMDiT together.

Branches of one sample differ in length: without its pictures the third has few tokens where the others have many. In one pass all are
padded to the longest; in passes of their own nothing is padded, but each pass takes the weights once more, and compiles as a program.
"""
from collections.abc import Iterator, Sequence

_WEIGHTS = 1024  # tokens whose products take about as long as one more gathering of the weights
_WORTH = 0.9  # a split must cost no more than this share of what one pass costs

Passes = tuple[tuple[int, ...], ...]  # branches of every pass, by index


def choose(tokens: Sequence[int], width: int, *, copies: int = 1, shards: int = 1) -> Passes:
    """The partition of the branches into passes that costs least, or one pass where no other is clearly cheaper.

    tokens: of each branch in the MMDiT's whole sequence. width: of the MMDiT. copies: tasks that run side by side, a row each in every
    branch. shards: devices over which rows lie; rows are filled up to a multiple of them.
    """
    def cost(passes: Passes) -> float:
        return sum(_WEIGHTS + rows_on_a_device(len(members) * copies, shards) * work(max(tokens[i] for i in members), width)
                   for members in passes)

    whole = (tuple(range(len(tokens))),)
    best = min(_partitions(len(tokens)), key=cost)
    return best if cost(best) <= _WORTH * cost(whole) else whole


def work(tokens: int, width: int) -> float:
    """Of a row's pass, in products of one token: a block has 24 D^2 FLOPs a token, and its attention 4 n D a token."""
    return tokens * (1 + tokens / (6 * width))


def rows_on_a_device(rows: int, shards: int) -> int:
    return -(-rows // shards)


def _partitions(count: int) -> Iterator[Passes]:
    """All partitions of 0..count-1, each part in rising order."""
    if count == 0:
        yield ()
        return
    for smaller in _partitions(count - 1):
        yield (*smaller, (count - 1,))
        for i, part in enumerate(smaller):
            yield (*smaller[:i], (*part, count - 1), *smaller[i + 1:])
