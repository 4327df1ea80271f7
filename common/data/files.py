"""The one place that opens data files: their rows as they stand, each with a text that says where
it stands.

    .jsonl .ndjson     one JSON object a line
    .json              a list of objects, or one object a line
    .csv .tsv          a header and cells, separated by commas, semicolons or tabs
    .parquet           columns
    .txt               one text a line, in a column `text`

Text files are UTF-8, with or without a byte order mark, with line ends of any system. A row that
cannot be read is a `UserError` in its place, so that a caller can leave it out; a file that cannot
be read raises one.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.conversation import UserError

Rows = Iterator[tuple[str, Any]]

TEXT_TYPES = (".txt",)
FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
MAX_DIGITS = 4300  # Python refuses to convert longer numbers, because that takes quadratic time
MAX_DEPTH = 100
TOO_DEEP = f"JSON that is nested too deeply; at most {MAX_DEPTH} levels are read"
SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(path: Path | str, *, suffix: str | None = None, nested: bool = False) -> Rows:
    """The rows of a data file, in order.

    Args:
        path: the file; `~` is the home folder.
        suffix: its type where its name does not tell it, such as that of a file of a cache.
        nested: a JSON file may also be an object. Its rows are then what stands in its lists,
            however deep, and each row names the keys that lead there as `key_0`, `key_1`, …; a text
            is a row with the column `text`.

    Yields:
        (where, row): the file with the line or the index of the row, and the row. A row is what
        JSON or Parquet holds, usually a dict; of CSV it is a dict of texts, where an empty cell is
        None. It is a `UserError` where the row cannot be read.

    Raises:
        UserError: the file is missing, of an unknown type, or cannot be read as a whole.
    """
    path = Path(path).expanduser()
    known = FILE_TYPES + TEXT_TYPES
    if suffix is None or path.suffix.lower() in known:
        suffix = path.suffix.lower()
    if suffix not in known:
        raise UserError(f"{path}: unknown file type; expected {', '.join(known)}")
    _check_file(path)
    try:
        if suffix == ".json":
            yield from _json_rows(path, nested)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _json_line_rows(path)
        elif suffix == ".parquet":
            yield from _parquet_rows(path)
        elif suffix == ".txt":
            yield from _text_rows(path)
        else:
            yield from _csv_rows(path, SEPARATORS[suffix])
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json(path: Path | str) -> Any:
    """The content of a file that is one JSON value.

    Raises:
        UserError: the file is missing, is no JSON, or holds what no row may hold (`parse_json`).
    """
    path = Path(path).expanduser()
    _check_file(path)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is repeated, of which YAML's loader takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen and key.value != "<<":
                problem = f"the key {key.value!r} is repeated; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or repeats a key.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeys)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not YAML: {reason}") from None


def parse_json(text: str, where: str) -> Any:
    """One JSON value out of a text that stands at `where`.

    Raises:
        UserError: malformed JSON, a key that is repeated, a number that is too long, nesting that
            is too deep, or half of a surrogate pair.
    """
    value = _decode(text, where)
    _refuse_faults(value, where)
    return value


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """Says in which line; the position in `error` counts from the start of a block of the file."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.decode(errors="ignore").encode() != line:
                where = f"{path}, line {number}"
                return UserError(f"{where}: not UTF-8 ({error.reason}); re-encode the file")
    return UserError(f"{path}: holds text that is not UTF-8 ({error.reason})")


# --- JSON -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fault:
    """Stands in a parsed value for what may not be there."""

    why: str


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    repeated = next(key for key in keys if keys.count(key) > 1)
    return _Fault(f"the key {repeated!r} is repeated; keep one")


def _integer(digits: str) -> Any:
    if len(digits) > MAX_DIGITS:
        return _Fault(f"a number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


# Python's parser, with a `_Fault` in the place of what it would read wrongly or not at all.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _decode(text: str, where: str, line: int | None = None) -> Any:
    """The value of a JSON text, which may hold faults; `line` is where it begins in its file.

    Raises:
        UserError: malformed JSON, or nesting that is far too deep.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {(line or 1) + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{place}: malformed JSON ({error.msg})") from None
    except RecursionError:
        place = where if line is None else f"{where}, line {line}"
        raise UserError(f"{place}: {TOO_DEEP}") from None


def _refuse_faults(value: Any, where: str) -> None:
    """Raise UserError for the first fault in a value, with the name of the field that holds it."""
    if not isinstance(value, dict):
        fault = _fault(value)
        if fault:
            raise UserError(f"{where}: {fault}")
        return
    for name, content in value.items():
        fault = _fault(name) or _fault(content)
        if fault:
            raise UserError(f"{where}, field {name}: {fault}")


def _fault(value: Any, depth: int = 1) -> str | None:
    """What is wrong with a value or with a part of it; None if nothing is."""
    if isinstance(value, _Fault):
        return value.why
    if isinstance(value, str):
        if SURROGATE.search(value):
            return (
                "holds a lone surrogate, which no tokenizer can read; re-encode the file as UTF-8"
            )
        return None
    if not isinstance(value, dict | list):
        return None
    if depth == MAX_DEPTH:
        return TOO_DEEP
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    for part in parts:
        fault = _fault(part, depth + 1)
        if fault:
            return fault
    return None


def _json_line_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}, line {number}", _json_line(line.rstrip(), path, number)


def _json_line(text: str, path: Path, line: int) -> Any:
    try:
        row = _decode(text, str(path), line)
        _refuse_faults(row, f"{path}, line {line}")
    except UserError as error:
        return error
    return row


def _json_rows(path: Path, nested: bool) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if _is_json_lines(text):
        yield from _json_line_rows(path)
        return
    value = _decode(text, str(path))
    if nested:
        rows = _leaves(value, str(path))
    elif isinstance(value, list):
        rows = iter(value)
    else:
        kind = type(value).__name__
        raise UserError(f"{path}: expected a JSON list of rows, found {kind}; one a line is .jsonl")
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        try:
            _refuse_faults(row, where)
        except UserError as error:
            row = error
        yield where, row


def _is_json_lines(text: str) -> bool:
    """Whether the first line is an object by itself, and another one follows in a line of its
    own.
    """
    lines = text.lstrip().split("\n", 1)
    if len(lines) < 2 or not lines[1].lstrip().startswith("{"):
        return False
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        return lines[0].startswith("{") and lines[0].rstrip().endswith("}")
    return isinstance(first, dict)


def _leaves(value: Any, where: str, keys: tuple[str, ...] = ()) -> Iterator[Any]:
    """What stands in the lists of nested objects, with the keys that lead there."""
    if isinstance(value, list):
        path = {f"key_{depth}": key for depth, key in enumerate(keys)}
        for leaf in value:
            if isinstance(leaf, str):
                leaf = {"text": leaf}
            yield path | leaf if isinstance(leaf, dict) else leaf
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{where}, {key}", (*keys, key))
    else:
        what = value.why if isinstance(value, _Fault) else f"expected a list, found {value!r:.60}"
        raise UserError(f"{where}: {what}")


# --- text -------------------------------------------------------------------------------------------------------------


def _text_rows(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    # Only "\n" ends a line; other characters that Python counts as line ends may stand in a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", {"text": line}


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, separators: tuple[str, ...]) -> Rows:
    # the default of 131,072 characters is less than a long answer
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        separator = _separator(path, separators)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        end = 0
        try:
            header = next(reader, [])
            _check_header(header, path)
            end = reader.line_num  # of the last row that could be read
            for cells in reader:
                end = reader.line_num
                if cells:
                    where = f"{path}, line {end}"
                    yield where, _csv_row(header, cells, where, separator)
        except csv.Error as error:
            raise UserError(f"{path}, line {end + 1}: malformed CSV ({error})") from None


def _csv_row(header: list[str], cells: list[str], where: str, separator: str) -> Any:
    if len(cells) > len(header):
        what = {",": "commas", ";": "semicolons", "\t": "tabs"}[separator]
        return UserError(
            f"{where}, field {header[-1]}: more cells follow; quote cells that contain {what}"
        )
    if len(cells) < len(header):
        absent = header[len(cells)]
        return UserError(f"{where}, field {absent}: missing, fewer cells than the header has")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _separator(path: Path, separators: tuple[str, ...]) -> str:
    """The separator that makes the most columns of the header; of equal ones the first."""
    counts = {}
    for separator in separators:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            try:
                counts[separator] = len(
                    next(csv.reader(lines, delimiter=separator, strict=True), [])
                )
            except csv.Error:  # a quoted name that is followed by another separator
                counts[separator] = 0
    return max(counts, key=counts.__getitem__)


def _check_header(header: list[str], path: Path) -> None:
    """Refuse a column that is repeated: whichever is taken, the labels of the other are lost."""
    for column in header:
        if header.count(column) > 1:
            raise UserError(f"{path}, field {column}: the column is repeated; rename or delete one")


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({reason})") from None
    except UnicodeDecodeError as error:
        where = f"{path}, row {number} or later"
        raise UserError(f"{where}: holds text that is not UTF-8 ({error.reason})") from None
