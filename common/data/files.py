"""The one place that opens data files. It yields their rows unchanged, each with a text that says
where the row is.

    .jsonl .ndjson     one JSON object a line
    .json              a list of objects, or one object a line
    .csv .tsv          a header and cells, separated by commas, semicolons or tabs
    .parquet           columns
    .txt               one text a line, in a column `text`

Text files are UTF-8, with or without a byte order mark, with the line ends of any system. A row
that cannot be read is yielded as a `UserError` in its place, so that a caller can leave it out. A
file that cannot be read raises one.
"""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from common.conversation import UserError, one_line

Rows = Iterator[tuple[str, Any]]

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_rows(
    path: Path | str,
    *,
    suffix: str | None = None,
    nested: bool = False,
) -> Rows:
    """The rows of a data file, in order.

    Args:
        path: the file; `~` is the home folder.
        suffix: the file's type if its name does not tell, as in a download cache.
        nested: a JSON file may also be an object. Its rows are then the items of the lists in it,
            however deep, and each row names the keys that lead to it as `key_0`, `key_1`, …; a text
            is a row with the column `text`.

    Yields:
        (where, row): the file with the line or the index of the row, and the row. A row is what
        JSON or Parquet holds, usually a dict; a row of a CSV file is a dict of texts, where an
        empty cell is None. It is a `UserError` if the row cannot be read.

    Raises:
        UserError: the file is missing, of an unknown type, or cannot be read as a whole.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind not in READERS and suffix:
        kind = suffix
    if kind not in READERS:
        raise UserError(f"{path}: unknown file type; expected {', '.join(READERS)}")
    read = READERS[kind]
    if nested and kind == ".json":
        read = _nested_json_rows
    yield from read(path)


def read_json(path: Path | str) -> Any:
    """The content of a file that is one JSON value. Raises UserError if the file is missing, or is
    not JSON.
    """
    path = Path(path).expanduser()
    return parse_json(_text(path), str(path))


def read_yaml(path: Path | str) -> Any:
    """The content of a YAML file. Raises UserError if it is missing, no YAML, or repeats a key."""
    path = Path(path).expanduser()
    try:
        return yaml.load(_text(path), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {one_line(error, 1000)}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        repeated = _repeated(keys)
        if repeated is not None:
            problem = f"the key {repeated!r} is repeated; keep one"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    if not content:
        raise UserError(f"{path}: the file is empty")
    return content


def _text(path: Path) -> str:
    """The content of a text file, without a byte order mark."""
    content = _content(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"not UTF-8 ({error.reason}); re-encode the file"
        raise UserError(f"{path}, line {line}: {fault}") from None


def _lines(path: Path) -> Rows:
    """The lines that are not blank.

    Only a line feed ends a line: other characters that Python counts as line ends may be part of a
    text.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\r")


def _text_rows(path: Path) -> Rows:
    for where, line in _lines(path):
        yield where, {"text": line}


def _repeated(names: Iterable[Any]) -> Any:
    """The first name that is there more than once, or None."""
    for name, count in Counter(names).items():
        if count > 1:
            return name
    return None


# --- JSON -------------------------------------------------------------------------------------


def parse_json(text: str, where: str) -> Any:
    """One JSON value. Raises UserError, which begins with `where`, if it is malformed, repeats a
    key, or holds a number or a nesting that Python does not read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        place = f"{where}{line}, column {error.colno}"
        raise UserError(f"{place}: malformed JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text. Python's own reader silently takes the last of repeated keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = _repeated(name for name, _ in pairs)
        raise ValueError(f"the key {repeated!r} is repeated; keep one")
    return found


def _json_line_rows(path: Path) -> Rows:
    for where, line in _lines(path):
        try:
            row = parse_json(line, where)
        except UserError as error:
            row = error
        yield where, row


def _json_rows(path: Path) -> Rows:
    text = _text(path)
    if text.lstrip().startswith("{"):
        yield from _json_line_rows(path)
        return
    value = parse_json(text, str(path))
    if not isinstance(value, list):
        kind = type(value).__name__
        raise UserError(f"{path}: expected a JSON list of rows, found {kind}")
    for number, row in enumerate(value):
        yield f"{path}, row {number}", row


def _nested_json_rows(path: Path) -> Rows:
    text = _text(path)
    try:
        value = parse_json(text, str(path))
    except UserError:  # it may hold one object a line
        yield from _json_rows(path)
        return
    for number, row in enumerate(_leaves(value, str(path))):
        yield f"{path}, row {number}", row


def _leaves(value: Any, where: str, keys: tuple[str, ...] = ()) -> Iterator[Any]:
    """The items of the lists in nested objects, with the keys that lead to them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{where}, {key}", (*keys, key))
        return
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, found {value!r:.60}")
    path = {f"key_{depth}": key for depth, key in enumerate(keys)}
    for leaf in value:
        if isinstance(leaf, str):
            leaf = {"text": leaf}
        if isinstance(leaf, dict):
            leaf = path | leaf
        yield leaf


# --- CSV --------------------------------------------------------------------------------------


def _csv_rows(path: Path, separators: str = ",;\t") -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default is less than a long answer
    text = _text(path)
    header = text.partition("\n")[0]
    separator = max(separators, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    end = 0  # the line where the last row that could be read ends
    try:
        _check_header(reader.fieldnames, path)
        end = reader.line_num
        for row in reader:
            end = reader.line_num
            where = f"{path}, line {end}"
            yield where, _csv_row(row, where)
    except csv.Error as error:
        raise UserError(f"{path}, line {end + 1}: malformed CSV ({error})") from None


def _csv_row(row: dict[str | None, Any], where: str) -> Any:
    """Python's reader puts what exceeds the header under the key None, and fills up a short row
    with None.
    """
    last = list(row)[-1]
    if last is None:
        fault = "more cells follow; quote cells that contain the separator"
        return UserError(f"{where}, field {list(row)[-2]}: {fault}")
    if row[last] is None:
        return UserError(f"{where}, field {last}: missing, fewer cells than the header has")
    return {column: cell or None for column, cell in row.items()}


def _check_header(header: Iterable[str], path: Path) -> None:
    """Refuse a repeated column: whichever is taken, the labels of the other are lost."""
    column = _repeated(header)
    if column is not None:
        raise UserError(f"{path}, field {column}: the column is repeated; rename or delete one")


# --- Parquet ----------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Rows:
    content = pyarrow.BufferReader(_content(path))
    try:
        file = pyarrow.parquet.ParquetFile(content)
        _check_header(file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"not a Parquet file of readable rows ({one_line(error)})"
        raise UserError(f"{path}: {what}") from None


READERS = {
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, separators="\t"),
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
