"""A stage is a table: what trains and at what rate, on which data, for how long. No code asks which stage it is."""
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vino_jax.errors import UserError
from vino_jax.nn.module import Params


@dataclass(frozen=True)
class StageConfig:
    """One stage of the curriculum.

    rules: ordered (regex, rate) over parameter paths such as "mmdit/double/...", full match, the first that matches decides;
      rate multiplies the learning rate, 0 freezes. Every parameter must match a rule and every rule must match a parameter.
    tasks, texts: weights by task and by kind of caption. text_dropout: share of rows whose text is empty;
      image_dropout: share whose text is empty and whose reference images are gone.
    buckets: names from the config's table of buckets. ema: decay, 0 for none. accumulate: microbatches a step.
    """

    name: str
    steps: int
    rules: tuple[tuple[str, float], ...]
    learning_rate: float
    tasks: dict[str, float]
    texts: dict[str, float]
    buckets: tuple[str, ...]
    warmup_steps: int = 50
    decay_steps: int = 0  # of the end of the stage over which the rate falls linearly to a tenth; 0 keeps it constant
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    accumulate: int = 1
    text_dropout: float = 0.1
    image_dropout: float = 0.1

    def __post_init__(self):
        if self.steps < 1 or self.accumulate < 1:
            raise UserError(f"stage {self.name!r}: steps and accumulate must be at least 1")


def by_path(tree: Params, prefix: str = "") -> dict[str, Any]:
    """{slash-joined path: leaf} in tree order; a leaf is whatever is no dict."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        flat |= by_path(tree[key], f"{prefix}{key}/") if isinstance(tree[key], dict) else {prefix + key: tree[key]}
    return flat


def rates(stage: StageConfig, params: Params) -> dict[str, float]:
    """Rate of every parameter path. Raises UserError naming all paths without a rule and all rules without a path."""
    compiled = [(re.compile(pattern), rate) for pattern, rate in stage.rules]
    found: dict[str, float] = {}
    idle = {pattern.pattern for pattern, _ in compiled}
    missing = []
    for path in by_path(params):
        for pattern, rate in compiled:
            if pattern.fullmatch(path):
                found[path] = rate
                idle.discard(pattern.pattern)
                break
        else:
            missing.append(path)
    if missing or idle:
        raise UserError(f"stage {stage.name!r}: " + "; ".join(
            ([f"no rule matches {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"] if missing else [])
            + ([f"nothing matches rule {', '.join(sorted(idle))}"] if idle else [])))
    return found


def split(params: Params, path_rates: Mapping[str, float]) -> tuple[Params, Params]:
    """(trainable, frozen): two trees that together hold every leaf once."""
    trainable: Params = {}
    frozen: Params = {}
    for path, leaf in by_path(params).items():
        node = trainable if path_rates[path] else frozen
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return trainable, frozen


def merge(first: Params, second: Params) -> Params:
    """The union of two trees; where both hold a leaf, the second's."""
    out = dict(first)
    for key, value in second.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
