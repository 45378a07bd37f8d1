"""A stage is a table: what trains and at what rate, on which data, for how long. No code asks which stage it is."""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vino_jax.errors import UserError
from vino_jax.nn.lora import Adapter, kernel_of
from vino_jax.nn.module import Params, by_path
from vino_jax.nn.stack import check_remat

# Fields of a stage, whether they hold what they may, and what that is.
_VALUES = (
    (("steps", "accumulate"), lambda value: value >= 1, "at least 1"),
    (("learning_rate", "warmup_steps", "decay_steps", "weight_decay"), lambda value: value >= 0, "0 or more"),
    (("eps", "clip", "lora_alpha"), lambda value: value > 0, "more than 0"),
    (("b1", "b2", "ema"), lambda value: 0 <= value < 1, "from 0 to less than 1"),
    (("text_dropout", "image_dropout"), lambda value: 0 <= value <= 1, "from 0 to 1"),
)
# Kernels that can have an adapter: the MMDiT's blocks apply them as one product each. That of single/out is applied in two halves.
_ADAPTABLE = re.compile("mmdit/((refiner/blocks|double)/.+|single/(attention/(query|key|value)|mlp|modulation))/kernel")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the curriculum.

    rules: ordered (regex, rate) over parameter paths such as "mmdit/double/...", full match, the first that matches decides;
      rate multiplies the learning rate, 0 freezes. Every parameter must match a rule and every rule must match a parameter.
    lora: ordered (regex, rank) over paths of kernels, full match, the first that matches decides: these stay as they are, whatever rules
      say, and get adapters (nn/lora.py) that train at rate 1. Every entry must match a kernel. lora_alpha: an adapter's scale is alpha / rank.
    optimizer: name in the table of train/optim.py.
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
    optimizer: str = "adamw"
    lora: tuple[tuple[str, int], ...] = ()
    lora_alpha: float = 16.0

    def __post_init__(self):
        wrong = [f"{name} is {getattr(self, name)}; it must be {words}"
                 for names, holds, words in _VALUES for name in names if not holds(getattr(self, name))]
        if self.decay_steps > self.steps:
            wrong.append(f"decay_steps is {self.decay_steps}, more than its {self.steps} steps")
        if self.text_dropout + self.image_dropout > 1:
            wrong.append(f"text_dropout {self.text_dropout} and image_dropout {self.image_dropout} are more than 1 together")
        wrong += [problem for pattern, rate in self.rules if (problem := _rule_problem(pattern, "rate", rate, 0))]
        wrong += [problem for pattern, rank in self.lora if (problem := _rule_problem(pattern, "rank", rank, 1))]
        wrong += [f"remat names bucket {name!r}, which it does not draw" for name in self.remat if name not in self.buckets]
        for name, policy in self.remat.items():
            check_remat(f"stage {self.name!r}: remat of bucket {name!r},", policy)
        if wrong:
            raise UserError(f"stage {self.name!r}: {'; '.join(wrong)}")


def _rule_problem(pattern: str, what: str, value: float, least: int) -> str:
    """What is wrong with an entry of rules or lora; "" where nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"rule {pattern!r} is no regex: {error}"
    return "" if value >= least else f"rule {pattern!r} has the {what} {value}; {what}s are {least} or more"


def rates(stage: StageConfig, params: Params) -> dict[str, float]:
    """Rate of every parameter path. Raises UserError naming all paths without a rule and all rules without a path.

    Adapters of other stages are frozen, as are the kernels that have one of this stage.
    """
    leaves = by_path(params)
    found, missing, idle = _first_matches(stage.rules, [path for path in leaves if kernel_of(path) is None])
    if missing or idle:
        raise UserError(f"stage {stage.name!r}: " + "; ".join(
            ([f"no rule matches {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"] if missing else [])
            + ([f"nothing matches rule {', '.join(sorted(idle))}"] if idle else [])))
    adapted = _first_matches(stage.lora, [path for path in leaves if path in found])[0]
    return {path: float(kernel_of(path) in adapted) if kernel_of(path) else 0.0 if path in adapted else found[path] for path in leaves}


def adapters(stages: Iterable[StageConfig], params: Params) -> dict[str, Adapter]:
    """{path of a kernel: its adapter} of all stages of a run. params: of the model without adapters.

    Raises UserError for an entry that matches nothing or what can have no adapter, and for stages that disagree.
    """
    found: dict[str, Adapter] = {}
    for stage in stages:
        ranks, _, idle = _first_matches(stage.lora, by_path(params))
        refused = [path for path in ranks if not _ADAPTABLE.fullmatch(path)]
        if idle:
            raise UserError(f"stage {stage.name!r}: nothing matches lora entry {', '.join(sorted(idle))}")
        if refused:
            raise UserError(f"stage {stage.name!r}: {refused[0]} can have no adapter; those that can match {_ADAPTABLE.pattern}")
        for path, rank in ranks.items():
            adapter = Adapter(rank, stage.lora_alpha)
            if found.setdefault(path, adapter) != adapter:
                raise UserError(f"stage {stage.name!r} gives {path} an adapter of rank {rank} and alpha {stage.lora_alpha}, a stage before it "
                                f"one of rank {found[path].rank} and alpha {found[path].alpha}; give both the same")
    return found


def _first_matches(table: Iterable[tuple[str, float]], paths: Iterable[str]) -> tuple[dict[str, float], list[str], set[str]]:
    """{path: value of the first entry that matches it}, paths without an entry, patterns that are no path's first."""
    compiled = [(re.compile(pattern), value) for pattern, value in table]
    found: dict[str, float] = {}
    idle = {pattern.pattern for pattern, _ in compiled}
    missing = []
    for path in paths:
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                found[path] = value
                idle.discard(pattern.pattern)
                break
        else:
            missing.append(path)
    return found, missing, idle


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
