"""What a sampling run uses where nothing else is said; a model checkpoint may carry its own (small models give small pictures)."""
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """The "sampling" table of a model checkpoint; build it with settings.build. The values here are the published model's (SPEC 7).

    None: 640x640 for pictures, 480x848 for clips; text guidance and shift 5 and 5.0 for pictures, 7 and 7.0 for clips.
    """

    height: int | None = None  # pixels: of the target where no reference sets it, and the budget of every reference
    width: int | None = None
    num_frames: int = 85  # of clips, 4k+1
    steps: int = 50
    guidance_image: float | None = None  # of the text, for pictures
    guidance_video: float | None = None  # and for clips
    shift_image: float | None = None
    shift_video: float | None = None
    image_guidance: float = 1.0  # above 1.0 a third branch runs

    def size(self, picture: bool) -> tuple[int, int]:
        """Height and width of a picture or a clip."""
        height, width = (640, 640) if picture else (480, 848)
        return self.height or height, self.width or width

    def guidance(self, picture: bool) -> float | None:
        """Of the text; None: the published value."""
        return self.guidance_image if picture else self.guidance_video

    def shift(self, picture: bool) -> float | None:
        """Of the flow time; None: the published value."""
        return self.shift_image if picture else self.shift_video
