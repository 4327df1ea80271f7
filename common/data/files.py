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
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from common.conversation import LONE_SURROGATE, SURROGATE, UserError

Rows = Iterator[tuple[str, Any]]

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ENCODING = "utf-8-sig"  # UTF-8, and a byte order mark is no text
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
MAX_DEPTH = 100
TOO_DEEP = f"JSON that is nested too deeply; at most {MAX_DEPTH} levels are read"


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
    kind = path.suffix.lower()
    if kind not in READERS:
        kind = suffix or kind
    if kind not in READERS:
        raise UserError(f"{path}: unknown file type; expected {', '.join(READERS)}")
    with _one_line_errors(path):
        if nested and kind == ".json":
            yield from _json_rows(path, nested=True)
        else:
            yield from READERS[kind](path)


def read_json(path: Path | str) -> Any:
    """The content of a file that is one JSON value.

    Raises:
        UserError: the file is missing, is no JSON, or holds what no row may hold (`parse_json`).
    """
    path = Path(path).expanduser()
    with _one_line_errors(path):
        return parse_json(path.read_text(ENCODING), str(path))


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: the file is missing, is no YAML, or repeats a key.
    """
    path = Path(path).expanduser()
    with _one_line_errors(path):
        try:
            return yaml.load(path.read_text(ENCODING), Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not YAML: {reason}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is repeated, of which YAML's loader takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [(key.tag, str(key.value)) for key, _ in node.value if key.value != "<<"]
        repeated = _repeated(keys)
        if repeated:
            problem = f"the key {repeated[1]!r} is repeated; keep one"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """What keeps a file from being read, as a `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        yield
    except UnicodeDecodeError as error:
        where = f"{path}, line {_undecodable_line(path)}"
        raise UserError(f"{where}: not UTF-8 ({error.reason}); re-encode the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _undecodable_line(path: Path) -> int:
    """The error itself counts from the start of a block of the file, and in bytes."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.decode(errors="ignore").encode() != line:
            return number
    return 0


def _repeated(names: Iterable[Any]) -> Any:
    """The first name that is there more than once, or None."""
    for name, count in Counter(names).items():
        if count > 1:
            return name
    return None


# --- JSON -------------------------------------------------------------------------------------


def parse_json(text: str, where: str) -> Any:
    """One JSON value out of a text that stands at `where`.

    Raises:
        UserError: malformed JSON, a key that is repeated, a number that is too long, nesting that
            is too deep, or half of a surrogate pair.
    """
    value = _decode(text, where)
    _refuse_faults(value, where)
    return value


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _repeated(name for name, _ in pairs)
    return UserError(f"the key {repeated!r} is repeated; keep one")


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:  # to convert a long number takes quadratic time, so Python refuses
        most = sys.get_int_max_str_digits()
        return UserError(f"a number of {len(digits)} digits; at most {most} are read")


# Python's parser, with a `UserError` in the place of what it would read wrongly or not at all.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _decode(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        place = f"{where}{line}, column {error.colno}"
        raise UserError(f"{place}: malformed JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{where}: {TOO_DEEP}") from None


def _refuse_faults(value: Any, where: str, depth: int = 0) -> None:
    """Raise `UserError` for the first fault in a parsed value; it names the field of the row."""
    if isinstance(value, UserError):
        raise UserError(f"{where}: {value}")
    if isinstance(value, str) and SURROGATE.search(value):
        raise UserError(f"{where}: {LONE_SURROGATE}")
    if not isinstance(value, dict | list):
        return
    if depth == MAX_DEPTH:
        raise UserError(f"{where}: {TOO_DEEP}")
    if isinstance(value, list):
        for part in value:
            _refuse_faults(part, where, depth + 1)
        return
    for name, content in value.items():
        place = where if depth else f"{where}, field {name}"
        _refuse_faults(name, place, depth + 1)
        _refuse_faults(content, place, depth + 1)


def _json_line_rows(path: Path) -> Rows:
    with path.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = parse_json(line.rstrip(), where)
                except UserError as error:
                    row = error
                yield where, row


def _json_rows(path: Path, nested: bool = False) -> Rows:
    text = path.read_text(ENCODING)
    first, _, rest = text.lstrip().partition("\n")
    one_object = first.startswith("{") and first.rstrip().endswith("}")
    if one_object and rest.lstrip().startswith("{"):
        yield from _json_line_rows(path)
        return
    value = _decode(text, str(path))
    if nested:
        value = _leaves(value, str(path))
    elif not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f"{path}: expected a JSON list of rows, found {kind}; one a line is .jsonl")
    for number, row in enumerate(value):
        where = f"{path}, row {number}"
        try:
            _refuse_faults(row, where)
        except UserError as error:
            row = error
        yield where, row


def _leaves(value: Any, where: str, keys: tuple[str, ...] = ()) -> Iterator[Any]:
    """What stands in the lists of nested objects, with the keys that lead there."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{where}, {key}", (*keys, key))
        return
    if not isinstance(value, list):
        _refuse_faults(value, where)
        raise UserError(f"{where}: expected a list, found {value!r:.60}")
    path = {f"key_{depth}": key for depth, key in enumerate(keys)}
    for leaf in value:
        if isinstance(leaf, str):
            leaf = {"text": leaf}
        yield path | leaf if isinstance(leaf, dict) else leaf


# --- text -------------------------------------------------------------------------------------


def _text_rows(path: Path) -> Rows:
    # Only "\n" ends a line; other characters that Python counts as line ends may stand in a text.
    for number, line in enumerate(path.read_text(ENCODING).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", {"text": line}


# --- CSV --------------------------------------------------------------------------------------


def _csv_rows(path: Path, separators: Iterable[str] = tuple(SEPARATORS)) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default is less than a long answer
    with path.open(encoding=ENCODING, newline="") as lines:
        separator = _separator(lines.read(100_000), separators)
        lines.seek(0)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        end = 0  # the line where the last row that could be read ends
        try:
            header = next(reader, [])
            _check_header(header, path)
            end = reader.line_num
            for cells in reader:
                end = reader.line_num
                if cells:
                    where = f"{path}, line {end}"
                    yield where, _csv_row(header, cells, where, separator)
        except csv.Error as error:
            raise UserError(f"{path}, line {end + 1}: malformed CSV ({error})") from None


def _csv_row(header: list[str], cells: list[str], where: str, separator: str) -> Any:
    if len(cells) > len(header):
        advice = f"quote cells that contain {SEPARATORS[separator]}"
        return UserError(f"{where}, field {header[-1]}: more cells follow; {advice}")
    if len(cells) < len(header):
        absent = header[len(cells)]
        return UserError(f"{where}, field {absent}: missing, fewer cells than the header has")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _separator(text: str, separators: Iterable[str]) -> str:
    """The separator that is most often in the header, quoted names apart; of equal ones the
    first.
    """
    header = re.sub('"[^"]*"?', "", text).partition("\n")[0]
    return max(separators, key=header.count)


def _check_header(header: list[str], path: Path) -> None:
    """Refuse a column that is repeated: whichever is taken, the labels of the other are lost."""
    column = _repeated(header)
    if column is not None:
        raise UserError(f"{path}, field {column}: the column is repeated; rename or delete one")


# --- Parquet ----------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Rows:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, path)
            batches = (batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(chain.from_iterable(batches)):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file of readable rows ({reason})") from None


READERS = {
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, separators="\t"),
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
