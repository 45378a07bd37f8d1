"""A run that trains adapters, from its config to its model and its file of adapters."""
import numpy as np
import pytest

from configs import common
from configs.data import bucket
from launch import convert, train
from tests.data.folders import SMALL_VLM
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.train.config import run_config


def config(folder, **entries):
    stage = dict(steps=2, learning_rate=1e-2, warmup_steps=0, rules=common.RULES["lora"], lora=common.ATTENTION_LORA, tasks={"t2i": 1.0},
                 texts={"long": 1.0}, buckets=("picture",))
    return run_config(common.config(
        model={"queries": 4, "connector_ratio": 2}, init={"checkpoint": str(folder / "init")}, runtime={"dtype": "bfloat16", "remat": "nothing"},
        mesh={"fsdp": 8}, data={"threads": 2}, buckets={"picture": bucket(8, 1, 32, 32, 72)}, stages={"stage1": {**stage, **entries}},
        log={"every": 1, "checkpoint_every": 2}).to_dict())


def arrays(directory, part):
    return dict(checkpoint.iter_arrays(directory, part, checkpoint.read_info(directory)))


def test_adapters_end_merged_in_the_model_and_in_a_file(tmp_path):
    vino = tiny.vino()
    checkpoint.save(tmp_path / "init", tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    model = train.train(config(tmp_path), tmp_path / "run", quiet=True)
    before, after = arrays(tmp_path / "init", "mmdit"), arrays(model, "mmdit")
    assert set(before) == set(after)  # a model as any other
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith(("double/", "single/")) and path.endswith("kernel")
                       and path.split("/")[-2] in ("query", "key", "value", "out") and path != "single/out/kernel"}
    convert.export_lora(tmp_path / "run", tmp_path / "lora")
    convert.merge_lora(tmp_path / "init", tmp_path / "lora", tmp_path / "merged")
    again = arrays(tmp_path / "merged", "mmdit")
    for path, leaf in after.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    convert.export_parts(tmp_path / "run", tmp_path / "from_run", "diffusers")  # what a run exports is what its model exports
    convert.export_parts(model, tmp_path / "from_model", "diffusers")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "from_run" / name).read_bytes() == (tmp_path / "from_model" / name).read_bytes()
    for part in ("vlm", "connector"):
        for path, leaf in arrays(model, part).items():
            np.testing.assert_array_equal(leaf, arrays(tmp_path / "init", part)[path])


def test_wrong_entries_of_a_stage_are_told(tmp_path):
    with pytest.raises(UserError, match="unknown optimizer 'adamw_b16', did you mean 'adamw_bf16'"):
        config(tmp_path, optimizer="adamw_b16")
