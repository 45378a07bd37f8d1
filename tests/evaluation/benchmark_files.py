"""Small prompt files of the public benchmarks, in their own formats, and what stands in for a model."""
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from vino_jax.evaluation.benchmarks import BENCHMARKS, plan, read_items
from vino_jax.sampling.video import write_output

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}], "prompt": "a photo of three buses"}]
VBENCH = [
    {"prompt_en": "A house, 1800s. Victorian.", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"],
     "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}}},
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency", "imaging_quality"]}]
VBENCH_I2V = [
    {"prompt_en": "a goat, camera pans left", "dimension": ["camera_motion"], "image_type": "animal", "image_name": "a goat.jpg"},
    {"prompt_en": "a goat", "dimension": ["i2v_subject", "temporal_flickering"], "image_type": "animal", "image_name": "a goat.jpg"}]
OPENS2V = {
    "singleobj_1": {"img_paths": ["Images/cup/52.jpg"], "prompt": "a cup of tea", "class_label": ["Cup"]},
    "faceobj_14": {"img_paths": ["Images/cup/52.jpg", "Images/man/1.png"], "prompt": "a man with a cup", "class_label": ["Cup", "Man"]}}
IMGEDIT = {
    "1082": {"id": "animal/000342021.jpg", "prompt": "Make the shell smooth.", "edit_type": "adjust"},
    "673": {"id": "style/1.jpg", "prompt": "Make it a woodblock print.", "edit_type": "style"}}


def picture(red=0):
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (red, 0, 0)).save(stream, "png")
    return stream.getvalue()


def gedit_rows():
    return [{"key": key, "task_type": kind, "instruction": f"{words} {language}", "instruction_language": language, "Intersection_exist": True,
             "input_image": {"bytes": picture(red), "path": None}}
            for red, (key, kind, words) in enumerate([("4c30", "background_change", "to the sea"), ("77aa", "subject-add", "a cat")])
            for language in ("en", "cn")]


def write_table(path, rows):
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 3)
    return path


def write_prompts(folder, name):
    """The small prompt file of a benchmark."""
    if name == "gedit":
        return write_table(folder / "gedit.parquet", gedit_rows())
    rows = {"geneval": GENEVAL, "vbench": VBENCH, "vbench_i2v": VBENCH_I2V, "imgedit": IMGEDIT}.get(name, OPENS2V)
    path = folder / f"{name}.json"
    path.write_text("\n".join(map(json.dumps, rows)) if name == "geneval" else json.dumps(rows))
    return path


def fake(name, prompts, output, samples=None):
    """What launch.benchmark generate writes, by a generator that knows no model: small black outputs with their metadata."""
    items = read_items(BENCHMARKS[name], prompts, samples, partial=True)
    BENCHMARKS[name].files(prompts, items, output)
    for wanted in plan(items, 7):
        frames = 2 if BENCHMARKS[name].is_clip else 1
        write_output(output, wanted.path[:-4], np.zeros((frames, 16, 16, 3), np.uint8), {"prompt": wanted.item.caption, "seed": str(wanted.seed)})
    return items
