"""launch.rewrite with a tiny random VLM: what it writes, for launch.sample to read, and how it ends."""
import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import models
from data_pipelines.packing import SamplingOptions, pack_rewrite, pack_task, padded_size
from data_pipelines.prompts import REWRITE_SYSTEM, Prompter
from data_pipelines.tasks import read_tasks
from launch import cli, generator, rewrite
from tests.data.folders import SMALL_VLM
from vino_jax.checkpoint import atomic
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.rewrite import Decoding, Rewriter
from vino_jax.sampling.video import write_output
from vino_jax.settings import VinoConfig, build
from vino_jax.sharding.mesh import make_mesh

NEW = 6
ONE = {"index": "one", "task": "t2i", "caption": "a red circle", "note": "kept"}
EDIT = {"index": 2, "task": "ti2i", "caption": "make it blue", "ref_image_paths": ["picture.png"]}
CLIP = {"index": "clip", "task": "tv2v", "caption": "turn it", "ref_video_path": "clip.mp4"}
LAST = {"index": "last", "task": "t2i", "caption": "a blue square"}
BAD = {"index": "bad", "task": "ti2i", "caption": "make it red", "ref_image_paths": ["no.png"]}


def config():
    table = models.tiny()
    table["vlm"]["text"]["vocab"] = 832  # what the tokenizer has words for
    return build(VinoConfig, table)


@pytest.fixture(scope="module")
def vlm():
    return Vino(config(), Runtime()).parts["vlm"]


@pytest.fixture(scope="module")
def params(vlm):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.3, vlm.abstract)


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
    """Looks like a finished training run whose model has a VLM and nothing else."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "model", {"vlm": params}, config(), processor_files=SMALL_VLM.glob("*.json"),
                    sampling={"height": 64, "width": 64, "num_frames": 5})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / "picture.png")
    write_output(folder, "clip", rng.integers(0, 256, (9, 64, 64, 3), np.uint8), {})
    return folder


@pytest.fixture
def run(workdir, root, tmp_path):
    """Runs the command on entries: exit code, and what tasks.json became."""
    def run(entries, *extra):
        (tmp_path / "tasks.json").write_text(json.dumps(entries))
        argv = ["--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out" / "new.json", "--root", root,
                "--max_new_tokens", NEW, *extra]
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: rewrite.main([str(a) for a in argv]))
        return ended.value.code, tmp_path / "out" / "new.json"
    return run


@pytest.fixture(scope="module")
def prompter():
    return Prompter(SMALL_VLM)


def test_captions_are_rewritten_and_the_rest_is_kept(run, root, vlm, params, prompter, capsys):
    code, new = run([ONE, BAD, EDIT, CLIP, LAST], "--batch", 2)
    told = capsys.readouterr()
    assert code == 1 and told.err.count("\n") == 1 and "FAILED" in told.err and "no.png" in told.err
    assert "5 tasks: 4 rewritten, 1 failed" in told.out and "2: ti2i, 6 tokens, cut: " in told.out
    entries = json.loads(new.read_text())
    assert [entry["index"] for entry in entries] == ["one", 2, "clip", "last"]
    for entry, before in zip(entries, (ONE, EDIT, CLIP, LAST)):
        assert entry == {**before, "caption": entry["caption"], "original_caption": before["caption"]} and entry["caption"] != before["caption"]
    tasks, problems = read_tasks(new, root)
    assert len(tasks) == 4 and not problems and sorted(p.name for p in new.parent.iterdir()) == ["new.json"]
    # the same by hand, each alone and without padding
    rewriter, seen = Rewriter(vlm, params, Decoding(NEW), prompter.stops), {}
    new.with_name("before.json").write_text(json.dumps([ONE, EDIT, CLIP]))
    for task in read_tasks(new.with_name("before.json"), root)[0]:
        [tokens] = rewriter.generate([unpadded(pack_rewrite(task, prompter, SamplingOptions(64, 64)))], [0])
        seen[task.index] = prompter.decode(tokens).strip()
    assert [seen[task.index] for task in tasks[:3]] == [task.caption for task in tasks[:3]]


def unpadded(prompt):
    length, patches = prompt.prompt_mask.sum(), (prompt.patch_segment > 0).sum()
    return prompt.replace(
        tokens=prompt.tokens[:, :length], prompt_mask=prompt.prompt_mask[:, :length], mrope=prompt.mrope[:, :, :length],
        visual_index=prompt.visual_index[:, :length], patches=prompt.patches[:, :patches], patch_coords=prompt.patch_coords[:, :patches],
        patch_segment=prompt.patch_segment[:, :patches])


def test_a_rewritten_file_keeps_its_first_captions(run):
    code, new = run([{**ONE, "original_caption": "circle"}])
    [entry] = json.loads(new.read_text())
    assert code == 0 and entry["original_caption"] == "circle" and entry["caption"] != ONE["caption"]


def test_seeds_and_a_mesh(run):
    sampled = ("--temperature", 2.0, "--top_k", 50, "--top_p", 0.95)

    def captions(*extra):
        return [entry["caption"] for entry in json.loads(run([ONE, LAST], *extra)[1].read_text())]

    first = captions(*sampled)
    assert captions(*sampled, "--batch", 1) == first != captions(*sampled, "--seed", 1)
    code, new = run([{**ONE, "index": i} for i in range(2)], *sampled)  # the same prompt, and numbers of its own
    assert len({entry["caption"] for entry in json.loads(new.read_text())}) == 2
    assert captions(*sampled, "--mesh", "fsdp=2,tensor=2,seq=2") == first


def test_accelerators_share_the_work_by_default(run, monkeypatch):
    """Here eight virtual devices, and a VLM of one key-value head: rows over "data"; in bfloat16."""
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(generator, "make_mesh", lambda sizes: asked.append(sizes) or make_mesh(sizes))
    assert run([ONE, EDIT])[0] == 0
    assert asked == [{"tensor": 1, "data": -1}]


@pytest.mark.parametrize("extra, words", [
    (("--temprature", 3), "unrecognized arguments: --temprature 3"),
    (("--max_new_tokens", 0), "max_new_tokens 0 must be at least 1"),
    (("--temperature", -1), "temperature -1.0 must be at least 0"),
    (("--temperature", "nan"), "temperature nan must be at least 0"),
    (("--temperature", 1, "--top_p", 0), "top_p 0.0 must be above 0 and at most 1"),
    (("--temperature", 1, "--top_k", -1), "top_k -1 must be at least 0"),
    (("--top_k", 20), "top_k and top_p need a temperature above 0"),
    (("--batch", 0), "--batch 0 must be at least 1"),
    (("--mesh", "date=2"), "unknown mesh axis 'date'"),
    (("--dtype", "float8"), "invalid choice: 'float8'"),
    (("--tasks", "nothing.json"), "cannot read the task file nothing.json"),
    (("--checkpoint", "nothing"), "nothing is no model checkpoint"),
    (("--output", "tests"), "--output tests is a folder; name a file"),
    (("--output", "README.md/new.json"), "cannot write to the folder README.md"),
])
def test_wrong_flags_and_files_end_with_2_and_one_line(extra, words, run, capsys, monkeypatch):
    monkeypatch.setattr(rewrite, "load_rewriter", None)  # told before the model is loaded
    code, new = run([ONE], *extra)
    told = capsys.readouterr()
    assert code == 2 and told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err
    assert not new.parent.exists()


def test_what_fails_on_the_way(run, capsys, monkeypatch):
    """A pass that runs out of memory, an empty text, a full disk; where nothing is rewritten, what was there stays."""
    code, new = run([ONE])
    before = new.read_text()

    def no_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Rewriter, "generate", no_memory)
        assert run([ONE, LAST])[0] == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == ["[1/2] FAILED task one: RESOURCE_EXHAUSTED: out of memory",
                                     "[2/2] FAILED task last: RESOURCE_EXHAUSTED: out of memory"]
    assert "2 tasks: 0 rewritten, 2 failed" in told.out and "is not written" in told.out and new.read_text() == before
    with monkeypatch.context() as patched:
        patched.setattr(Prompter, "decode", lambda self, ids: " \n")
        assert run([ONE])[0] == 1
    assert "FAILED task one: the model wrote an empty caption" in capsys.readouterr().err and new.read_text() == before
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "write_text", full)
        assert run([LAST])[0] == 2
    assert capsys.readouterr().err == f"error: cannot write {new}: No space left on device\n" and new.read_text() == before


def test_the_vlm_sees_what_it_sees_in_sampling(root, prompter, tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps([ONE, EDIT, CLIP]))
    options = SamplingOptions(64, 96, 5)
    for task in read_tasks(tmp_path / "tasks.json", root)[0]:
        prompt, positive = pack_rewrite(task, prompter, options), pack_task(task, prompter, options).branches[0]
        text = prompter.tokenizer.decode(prompt.tokens[prompt.prompt_mask])
        assert f"system\n{REWRITE_SYSTEM}<|im_end|>" in text and text.endswith(f"{task.caption}<|im_end|>\n<|im_start|>assistant\n")
        used, length = positive.patch_segment[0] > 0, int(prompt.prompt_mask.sum())
        np.testing.assert_array_equal(prompt.patch_segment[0][:used.sum()], positive.patch_segment[0][used])
        np.testing.assert_array_equal(prompt.patches[0][:used.sum()], positive.patches[0][used])
        assert prompt.patches.shape[1] == padded_size(int(used.sum())) and prompt.tokens.shape[1] == padded_size(length)
        assert not prompt.patch_segment[0][used.sum():].any() and prompt.role.shape == (1, 0)
    (root / "broken.png").write_bytes(b"no picture")
    (tmp_path / "tasks.json").write_text(json.dumps([{**EDIT, "ref_image_paths": ["broken.png"]}]))
    with pytest.raises(UserError, match=re.escape("task 2: ") + ".*broken.png"):
        pack_rewrite(read_tasks(tmp_path / "tasks.json", root)[0][0], prompter, options)


def test_few_sizes():
    sizes = [padded_size(n) for n in range(2000)]
    assert sorted(set(sizes)) == [0, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(size >= n and (size < 1.5 * n + 1 or size == 64) for n, size in enumerate(sizes))


def test_one_program_a_shape_and_bfloat16(params, prompter, tmp_path):
    (tmp_path / "tasks.json").write_text(json.dumps([ONE, LAST, {**ONE, "index": 3, "caption": "green"}]))
    prompts = [pack_rewrite(task, prompter, SamplingOptions(64, 64)) for task in read_tasks(tmp_path / "tasks.json")[0]]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rewriter = Rewriter(Vino(config(), Runtime(dtype="bfloat16")).parts["vlm"], half, Decoding(NEW), prompter.stops)
    first, last = rewriter.generate(prompts[:2], [0, 0]), rewriter.generate(prompts[2:], [0])
    assert len(first) == 2 and len(last) == 1 and rewriter.generate(prompts[1:2], [0]) == first[1:]
    assert rewriter._generate._cache_size() == 1
