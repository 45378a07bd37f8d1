"""The one table form that conversion reads in both directions."""
from dataclasses import dataclass

from vino_jax.convert.ops import COPY, Op


@dataclass(frozen=True)
class Rule:
    """Our leaf `jax` (slash-joined path in the part's tree) is `op` of the PyTorch tensor `torch`.

    "{i}" in `torch` marks a stacked leaf: layer i of ours, along the leading dim, is that name with i filled in.
    """

    jax: str
    torch: str
    op: Op = COPY


@dataclass(frozen=True)
class LeftOut:
    """PyTorch names (regex, full match) that have no leaf of ours, and why."""

    torch: str
    reason: str


@dataclass(frozen=True)
class Table:
    """All rules of one part (mmdit, vae, vlm, connector, vae_connector, queries)."""

    rules: tuple[Rule, ...]
    left_out: tuple[LeftOut, ...] = ()
