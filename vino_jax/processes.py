"""Several processes that run one command, each with devices of its own: which is the first, and how all learn what it decided."""
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store of keys that all processes share has no public name; Orbax takes it from there too

from vino_jax.errors import UserError

WAIT_MS = 6 * 3600 * 1000  # for what the first process does: an import of large parts from a slow disk takes an hour
_calls = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that writes what all share."""
    return jax.process_index() == 0


def store() -> Any:
    """The client of the store of keys that all processes share: key_value_set(key, text), blocking_key_value_get(key, milliseconds)."""
    return distributed.global_state.client


def of_first(make: Callable[[], Any]) -> Any:
    """make() on the first process alone; what it returns (a JSON value) on all, or on all the UserError that it raised.

    To be called on all processes, in the same order. The others wait on the host: no program waits on a device meanwhile, where it
    would be taken for one that hangs.
    """
    if jax.process_count() == 1:
        return make()
    key = f"vino_jax/of_first/{next(_calls)}"
    if is_first():
        told = {"error": "the first process of this run failed, see its own message"}
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
        finally:
            store().key_value_set(key, json.dumps(told))
    else:
        told = json.loads(store().blocking_key_value_get(key, WAIT_MS))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]
