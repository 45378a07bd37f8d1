"""JAX's cache of compiled programs on disk: where it lies, and how many programs came from it."""
import collections
import contextlib
import functools
from collections.abc import Callable, Iterator

import jax

_REQUESTS, _HITS = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))
_met: collections.Counter[str] = collections.Counter()


def use(folder: str) -> None:
    """Keep compiled programs in `folder`; "": where JAX's own JAX_COMPILATION_CACHE_DIR says, if anywhere. To be called before the first
    program is compiled."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(lambda name, **_: _met.update([name]))


@contextlib.contextmanager
def told(stage: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says how many of the programs that this block compiles came from the cache, where there is one."""
    _listen()
    before = collections.Counter(_met)
    yield
    asked, found = (_met[name] - before[name] for name in (_REQUESTS, _HITS))
    if asked:
        say(f"{stage}: {found} of {asked} programs came from the compile cache")
