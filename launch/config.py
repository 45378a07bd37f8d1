"""Command line of the entry points that take a config file: --config FILE[:ARGUMENT] --config.KEY=VALUE ... and their own flags."""
import argparse
import ast
import importlib.util
import inspect
import pathlib
from typing import Any

import ml_collections

from launch import cli
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path
from vino_jax.settings import nearest


def load_config(path: str | pathlib.Path, overrides: dict[str, str], argument: str = "") -> dict[str, Any]:
    """get_config() of a Python file as plain nested dicts, with overrides by dotted key.

    FILE.py:ARGUMENT calls get_config("ARGUMENT"); else one that takes an argument gets `argument`, if that is not empty.
    Raises UserError for a file that is missing or no config or takes no argument, an unknown key (with the nearest name), a value of
    another type, or an address where only local paths are (cli.local_path).
    """
    file, found, own = str(path).partition(".py:")
    config = _read(pathlib.Path(file + ".py" if found else path), own if found else None, argument)
    for key, text in overrides.items():
        _override(config, key, text)
    values = config.to_dict()
    for value in by_path(values).values():
        if isinstance(value, str):
            cli.local_path(value)
    return values


def _read(file: pathlib.Path, own: str | None, argument: str) -> ml_collections.ConfigDict:
    """get_config() of the file. What the file itself raises keeps its traceback: it is code."""
    if not file.is_file():
        raise UserError(f"config file {file} does not exist")
    spec = importlib.util.spec_from_file_location("vino_jax_config", file)
    if spec is None:
        raise UserError(f"config file {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", lambda: None)
    takes = bool(inspect.signature(get_config).parameters)
    if own is not None and not takes:
        raise UserError(f"config file {file} takes no argument: leave out {':' + own!r}")
    given = own if own is not None else argument
    config = get_config(given) if takes and given else get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config file {file} must define get_config() that returns an ml_collections.ConfigDict, as those of configs/ do")
    return config


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *parents, last = key.split(".")
    node: Any = config
    for i, name in enumerate([*parents, last]):
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            known = node.keys() if isinstance(node, ml_collections.ConfigDict) else ()
            raise UserError(f"unknown config key {'.'.join([*parents, last][:i + 1])!r}{nearest(name, known)}")
        if name != last or i < len(parents):
            node = node[name]
    try:
        value = text if isinstance(node[last], str) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
        raise UserError(f"config key {key!r} takes {type(node[last]).__name__}, not {text!r}") from None
    if isinstance(node[last], float) and isinstance(value, int):
        value = float(value)
    try:
        node[last] = value
    except TypeError:
        raise UserError(f"config key {key!r} takes {type(node[last]).__name__}, not {text!r}") from None


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, argument: str = "") -> tuple[argparse.Namespace, dict[str, Any]]:
    """The parser's own flags, and the config that --config and --config.KEY=VALUE (or --config.KEY VALUE) name.

    argument: name of the flag whose value a config gets that takes an argument and has none in --config.
    """
    parser.add_argument("--config", required=True, type=pathlib.Path,
                        help="config file, FILE.py:ARGUMENT where it takes one; --config.KEY=VALUE overrides one of its keys")
    flags, rest = parser.parse_known_args(argv)
    overrides: dict[str, str] = {}
    rest = list(rest)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            raise UserError(f"unknown flag {flag!r}; see --help")
        key, found, value = flag.removeprefix("--config.").partition("=")
        if not found and not rest:
            raise UserError(f"flag {flag!r} needs a value")
        overrides[key] = value if found else rest.pop(0)
    return flags, load_config(flags.config, overrides, getattr(flags, argument) if argument else "")
