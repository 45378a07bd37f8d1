"""Buckets: sets of static shapes."""


def bucket(batch: int, frames: int, height: int, width: int, prompt_tokens: int, *, patches: int = 0, images: int = 0,
           video_frames: int = 0) -> dict:
    """One bucket; reference images and clips share the target's height and width."""
    return {
        "batch": batch, "frames": frames, "height": height, "width": width, "prompt_tokens": prompt_tokens, "patches": patches,
        "images": images, "image_height": height if images else 0, "image_width": width if images else 0,
        "video_frames": video_frames, "video_height": height if video_frames else 0, "video_width": width if video_frames else 0,
    }
