"""Rows of the prompt files of public benchmarks: JSON, JSON lines, CSV, and tables that hold pictures (parquet, Arrow).

A row is (where, fields); `where` names the file and the line or key, to begin a UserError with. All raise UserError for a file that cannot be
read, holds no row, or a row of another kind.
"""
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vino_jax.errors import UserError

Row = tuple[str, Mapping[str, Any]]
_TABLES = (".parquet", ".arrow")
_AT_ONCE = 16  # rows of a parquet file with pictures, in memory together


def json_lines(path: Path) -> list[Row]:
    """An object a line; blank lines are skipped."""
    lines = [(f"{path}: line {number}", line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    return _rows(path, [(where, _parse(line, where)) for where, line in lines])


def json_array(path: Path) -> list[Row]:
    """An array of objects."""
    entries = _parse(_text(path), str(path))
    if not isinstance(entries, list):
        raise UserError(f"{path} must be a JSON array")
    return _rows(path, [(f"{path}: entry {number}", entry) for number, entry in enumerate(entries)])


def json_object(path: Path) -> list[Row]:
    """An object of objects; its keys become the field `key`."""
    entries = read_object(path)
    rows = _rows(path, [(f"{path}: {key!r}", entry) for key, entry in entries.items()])
    return [(where, {**row, "key": key}) for (where, row), key in zip(rows, entries, strict=True)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. A key that occurs twice is an error: the parser would drop the first."""
    entries = _parse(_text(path), str(path))
    if not isinstance(entries, dict):
        raise UserError(f"{path} must be a JSON object")
    return entries


def read_csv(path: Path) -> list[Row]:
    """A header, and a row a line."""
    with _told(path), path.open(newline="", encoding="utf-8") as stream:
        return _rows(path, [(f"{path}: row {number}", row) for number, row in enumerate(csv.DictReader(stream), 1)])


def table(path: Path, columns: Sequence[str]) -> list[Row]:
    """These columns of a parquet or Arrow file, or of all those in a folder, in the order of their names."""
    rows = []
    for file in _files(path):
        for number, row in enumerate(row for batch in _batches(file, columns) for row in batch.to_pylist()):
            rows.append((f"{file}: row {number}", row))
    return _rows(path, rows)


def pictures(path: Path, column: str) -> Iterator[bytes | None]:
    """The bytes in a column of pictures ({bytes, path} as the `datasets` package stores them) of the same rows, a few in memory at a time; None
    where there are none."""
    for file in _files(path):
        for batch in _batches(file, [column]):
            for i in range(batch.num_rows):
                cell = batch.column(0)[i].as_py()
                yield cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.rglob("*") if file.suffix in _TABLES) if path.is_dir() else [path]
    if not files or files[0].suffix not in _TABLES:
        raise UserError(f"{path} is no {' or '.join(_TABLES)} file, nor a folder of those")
    return files


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    with _told(file):
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as opened:
                _check_columns(file, opened.schema_arrow, columns)
                yield from (batch.select(columns) for batch in opened.iter_batches(_AT_ONCE, columns=list(columns)))
        else:  # mapped: what is not asked for is not read
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as opened:
                _check_columns(file, opened.schema, columns)
                yield from (batch.select(columns) for batch in opened)


def _check_columns(file: Path, schema: pyarrow.Schema, columns: Sequence[str]) -> None:
    lacking = [name for name in columns if name not in schema.names]
    if lacking:
        raise UserError(f"{file} has no column {', '.join(lacking)}; it has {', '.join(schema.names)}")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _text(path: Path) -> str:
    with _told(path):
        return path.read_text(encoding="utf-8")


def _parse(text: str, where: str) -> Any:
    def once(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise UserError(f"{where}: the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=once)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair can be read and neither written nor named
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None


def _rows(path: Path, rows: list[tuple[str, Any]]) -> list[Row]:
    if not rows:
        raise UserError(f"{path} is empty")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is {type(row).__name__}, not an object")
    return rows
