"""A stage is a table: what trains and at what rate, on which data, for how long. No code asks which stage it is."""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vino_jax.errors import UserError
from vino_jax.nn.module import Params, by_path
from vino_jax.nn.stack import check_remat

# Fields of a stage, whether they hold what they may, and what that is.
_VALUES = (
    (("steps", "accumulate"), lambda value: value >= 1, "at least 1"),
    (("learning_rate", "warmup_steps", "decay_steps", "weight_decay"), lambda value: value >= 0, "0 or more"),
    (("eps", "clip"), lambda value: value > 0, "more than 0"),
    (("b1", "b2", "ema"), lambda value: 0 <= value < 1, "from 0 to less than 1"),
    (("text_dropout", "image_dropout"), lambda value: 0 <= value <= 1, "from 0 to 1"),
)


@dataclass(frozen=True)
class StageConfig:
    """One stage of the curriculum.

    rules: ordered (regex, rate) over parameter paths such as "mmdit/double/...", full match, the first that matches decides;
      rate multiplies the learning rate, 0 freezes. Every parameter must match a rule and every rule must match a parameter.
    tasks, texts: weights by task and by kind of caption. text_dropout: share of rows whose text is empty;
      image_dropout: share whose text is empty and whose reference images are gone.
    buckets: names from the config's table of buckets. remat: policies (nn/stack.py) of some of them, by default the runtime's.
    ema: decay, 0 for none. accumulate: microbatches a step.
    Raises UserError that names every value that it may not have.
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
    remat: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        wrong = [f"{name} is {getattr(self, name)}; it must be {words}"
                 for names, holds, words in _VALUES for name in names if not holds(getattr(self, name))]
        if self.decay_steps > self.steps:
            wrong.append(f"decay_steps is {self.decay_steps}, more than its {self.steps} steps")
        if self.text_dropout + self.image_dropout > 1:
            wrong.append(f"text_dropout {self.text_dropout} and image_dropout {self.image_dropout} are more than 1 together")
        wrong += [problem for pattern, rate in self.rules if (problem := _rule_problem(pattern, rate))]
        wrong += [f"remat names bucket {name!r}, which it does not draw" for name in self.remat if name not in self.buckets]
        for name, policy in self.remat.items():
            check_remat(f"stage {self.name!r}: remat of bucket {name!r},", policy)
        if wrong:
            raise UserError(f"stage {self.name!r}: {'; '.join(wrong)}")


def _rule_problem(pattern: str, rate: float) -> str:
    """What is wrong with a rule; "" where nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"rule {pattern!r} is no regex: {error}"
    return "" if rate >= 0 else f"rule {pattern!r} has the rate {rate}; rates are 0 or more"


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
