"""What every training config shares: the paper's three stages and the table of keys."""
import ml_collections

# Which parameters train: ordered (regex, rate), 0 freezes; the first that matches a path decides.
_FROZEN = (("vlm/.*", 0.0), ("vae/.*", 0.0))
_UNUSED = ("mmdit/pooled/.*", 0.0)  # published weights that no forward pass reads

RULES = {
    "stage1": (("connector/.*", 1.0), ("(mmdit|vae_connector|queries)/.*", 0.0), *_FROZEN),
    "stage2": (_UNUSED, ("(connector|mmdit|queries)/.*", 1.0), ("vae_connector/.*", 0.0), *_FROZEN),
    "stage3": (_UNUSED, ("(connector|vae_connector|mmdit|queries)/.*", 1.0), *_FROZEN),
    "lora": (("(connector|vae_connector|mmdit|queries)/.*", 0.0), *_FROZEN),  # nothing but the stage's adapters
}
# Which kernels get adapters of which rank, for a stage's `lora`: those of attention in double and single blocks.
ATTENTION_LORA = (("mmdit/(double|single)/.*(query|key|value|(visual|context)/out)/kernel", 16),)
PLAIN_TASKS = {"t2i": 0.3, "t2v": 0.7}
ALL_TASKS = {"t2i": 0.1, "t2v": 0.1, "i2v": 0.1, "ti2v": 0.15, "ti2i": 0.25, "ti2i_baseimg": 0.05, "tv2v": 0.15, "tiv2v": 0.1}


def curriculum(steps: tuple[int, int, int], rates: tuple[float, float, float], plain: tuple[str, ...], mixed: tuple[str, ...],
               *, remat: dict[str, str] | None = None, ema: float = 0.9999,
               plain_tasks: dict[str, float] = PLAIN_TASKS, all_tasks: dict[str, float] = ALL_TASKS) -> dict:
    """The three stages: connector only; long and short prompts with the MMDiT; all tasks mixed.

    plain, mixed: names of the buckets of stages 1 and 2, and of stage 3; plain_tasks, all_tasks: theirs, with shares of the rows.
    remat: policies (nn/stack.py) of some buckets.
    """
    stages = {
        "stage1": {"steps": steps[0], "learning_rate": rates[0], "rules": RULES["stage1"], "tasks": dict(plain_tasks),
                   "texts": {"long": 1.0}, "buckets": plain, "ema": 0.0},
        "stage2": {"steps": steps[1], "learning_rate": rates[1], "rules": RULES["stage2"], "tasks": dict(plain_tasks),
                   "texts": {"long": 0.5, "short": 0.5}, "buckets": plain, "ema": ema},
        "stage3": {"steps": steps[2], "learning_rate": rates[2], "rules": RULES["stage3"], "tasks": dict(all_tasks),
                   "texts": {"long": 0.25, "short": 0.25, "instruction": 0.5}, "buckets": mixed, "ema": ema},
    }
    return {name: {**entry, "remat": {bucket: (remat or {})[bucket] for bucket in entry["buckets"] if bucket in (remat or {})}}
            for name, entry in stages.items()}


def stage(**entries) -> dict:
    """A stage with every key of StageConfig, so that each can be overridden from the command line."""
    defaults = {"warmup_steps": 50, "decay_steps": 0, "b1": 0.9, "b2": 0.95, "eps": 1e-15, "weight_decay": 0.0, "clip": 1.0, "ema": 0.0,
                "accumulate": 1, "text_dropout": 0.1, "image_dropout": 0.1, "remat": {}, "optimizer": "adamw", "lora": (), "lora_alpha": 16.0}
    return {**defaults, **entries}


def config(**entries) -> ml_collections.ConfigDict:
    """A training config with every key present (vino_jax/train/config.py says what each means); entries replace whole tables' keys."""
    defaults = {
        "seed": 0,
        "model": {"queries": 256, "connector_ratio": 4, "boundary_tokens": True},
        "init": {"checkpoint": "", "vino": "", "mmdit": "", "vae": "", "vlm": "", "require": ("vae", "vlm", "mmdit")},
        "runtime": {"dtype": "bfloat16", "remat": "full", "attention": "auto", "quantize": ""},
        "mesh": {"preset": "fsdp", "data": 1, "fsdp": -1, "seq": 1, "tensor": 1},
        "data": {"source": "shapes", "manifest": "", "held_out": "", "root": ".", "bad_items": "stop",
                 "clips": {"windows": "head", "count": 1, "stride": 0, "compat": "reference"},
                 "precomputed": "", "processor": "", "shift_image": 5.0, "shift_video": 7.0, "threads": 1, "workers": 0, "prefetch": 8},
        "buckets": {},
        "stages": {},
        "log": {"every": 10, "checkpoint_every": 100, "keep": 2, "preview_every": 0, "preview_count": 4, "preview_sampling_steps": 20,
                "preview_guidance": 3.0, "evaluate_every": 0, "evaluate_rows": 8, "hang_minutes": 0.0, "compile_cache": "", "profile_port": 0},
        "sampling": {},
    }
    for name, value in entries.items():
        if name not in defaults:
            raise KeyError(f"unknown config table {name!r}")
        defaults[name] = {**defaults[name], **value} if isinstance(value, dict) else value
    defaults["stages"] = {name: stage(**entry) for name, entry in defaults["stages"].items()}
    return ml_collections.ConfigDict(defaults, convert_dict=True)
