"""What a disk or a damaged file does to Orbax, told as an error of the user; any other error is left as it is."""
import contextlib
import sys
from collections.abc import Iterator

from orbax.checkpoint import v1 as ocp

from vino_jax.errors import UserError

# how tensorstore says it: data that is gone, or shorter or other than it was written; and a disk that takes no more
_DAMAGED = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE")
_FULL = ("No space left on device", "Disk quota exceeded")


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Raises UserError: with the advice where `what` is gone or cut off; with the system's reason where it cannot be read now."""
    before = sys.exc_info()[1]
    try:
        yield
    except Exception as error:  # Orbax raises bare Exceptions for data that is cut off, and others around them
        for one in _causes(error, before):
            if isinstance(one, (FileNotFoundError, ocp.errors.InvalidLayoutError)) or any(code in str(one) for code in _DAMAGED):
                raise UserError(f"{what} is damaged or incomplete; {advice}") from error
            if reason := refusal(one):
                raise UserError(f"cannot read {what}: {reason}") from error
        raise


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises UserError where the disk does not take what is written."""
    before = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        for one in _causes(error, before):
            if reason := refusal(one):
                raise UserError(f"cannot write {what}: {reason}") from error
        raise


def refusal(error: BaseException) -> str:
    """What the system said where it refused something, "" where it did not. A TimeoutError without a number is Orbax's own."""
    if isinstance(error, OSError) and not (isinstance(error, TimeoutError) and error.errno is None):
        return error.strerror or str(error)
    return next((text for text in _FULL if text in str(error)), "")


def _causes(error: BaseException | None, before: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of, up to one that was under way `before`."""
    while error is not None and error is not before:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
