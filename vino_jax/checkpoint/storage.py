"""What a disk or a damaged file does to Orbax, told as an error of the user; any other error is left as it is."""
import contextlib
from collections.abc import Iterator

from orbax.checkpoint import v1 as ocp

from vino_jax.errors import UserError

_FULL = ("No space left on device", "Disk quota exceeded")  # how tensorstore says it


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Raises UserError, with the advice, where `what` is gone, cut off or cannot be read."""
    try:
        yield
    except Exception as error:  # Orbax raises bare Exceptions for data that is cut off, and others around them
        if any(isinstance(one, (OSError, ocp.errors.InvalidLayoutError)) or "tensorstore" in str(one).lower() for one in _causes(error)):
            raise UserError(f"{what} is damaged or incomplete; {advice}") from error
        raise


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises UserError where the disk does not take what is written."""
    try:
        yield
    except Exception as error:
        for one in _causes(error):
            if isinstance(one, OSError):
                raise UserError(f"cannot write {what}: {one.strerror or one}") from error
            for text in _FULL:
                if text in str(one):
                    raise UserError(f"cannot write {what}: {text}") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
