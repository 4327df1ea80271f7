"""What identifies a model or a file, and rows that survive a kill.

A long job keeps what it makes, row by row, in a file of JSON lines, each row under a key. The key
is a `digest` of all that the row depends on: the item, the settings, and the `fingerprint` of every
model and file. So what another model said is never taken for the answer of this one, and a job that
was killed goes on where it stopped.
"""

import fcntl
import hashlib
import json
import logging
import re
from collections import UserDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm

from common.bundled import resolve_model
from common.conversation import UserError
from common.data.files import read_rows
from common.engines import Completion
from common.run import Stopped, expand_home

logger = logging.getLogger(__name__)
Row = dict[str, Any]

# A folder with one of these holds a model.
MARKS_A_MODEL = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|onnx)|.*config\.json|tokenizer\.json|guard\.json"
)
# What there says what the model does …
OF_A_MODEL = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|onnx|onnx\.data|json|jinja|py|model|spm|tiktoken)|vocab\.txt|merges\.txt"
)
TEMPLATES = "additional_chat_templates"  # the one folder in it that `from_pretrained` reads
# … but for these, which runs leave beside it.
OF_A_RUN = re.compile(
    r"(run|results|.*_results|.*_results_.*|predictions|evaluation|manifest|trainer_state|recipe|unfinished)\.json"
    r"|training_args\.bin|(optimizer|scheduler|scaler)\..*|rng_state.*"
)

LARGE = 1 << 20  # bytes of a file that is not read twice in one process
TIMEOUT = 10.0  # seconds that the hub has to name a commit


# --- fingerprints ---------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A key of 32 hexadecimal digits for a JSON-like value, whatever the order of its keys.

    What JSON does not have, such as a path or a date, counts as its text.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    total = hashlib.sha256(text.encode())
    return total.hexdigest()[:32]


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A key of 16 hexadecimal digits for JSON-like rows in their order, wherever they came from."""
    total = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True)
        total.update(text.encode())
    return total.hexdigest()[:16]


def fingerprint(path: str | Path, without: Collection[str] = (), is_data: bool = False) -> str:
    """The content of a model, an adapter or a data file, as 64 hexadecimal digits.

    A folder with a model counts as the files that say what the model does: weights, configs,
    tokenizer, templates, adapter and guard.json. README, logs, checkpoints and results do not
    count. A folder without a model holds data, and all its files count. Where a folder or a file
    lies, how it is called and when it was written makes no difference.

    Args:
        path: a folder, a file, the name of the bundled model, or a hub id. A hub id counts as the
            commit that would be loaded: the hub's, or without a hub that of the local cache. It
            counts as its name alone where neither knows it, and so does any other name.
        without: names of files of a folder that make no difference.
        is_data: a folder holds data, even where a config or weights lie beside them.

    Raises:
        UserError: a file cannot be read.
    """
    place = Path(resolve_model(expand_home(str(path))))
    try:
        if place.is_file():
            return _of_file(place)
        if place.is_dir():
            return _of_folder(place, without, is_data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    identity = f"{path}@{_commit(str(path))}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _of_folder(folder, without, is_data) -> str:
    total = hashlib.sha256()
    for file in _files_that_count(folder, is_data):
        name = file.relative_to(folder).as_posix()
        if name not in without:
            line = f"{name}\n{_of_file(file)}\n"
            total.update(line.encode())
    return total.hexdigest()


def _files_that_count(folder, is_data) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file()]
    is_a_model = any(MARKS_A_MODEL.fullmatch(path.name) for path in files)
    if is_a_model and not is_data:
        files += folder.glob(f"{TEMPLATES}/*.jinja")
        counts = _is_of_a_model
    else:
        files = [path for path in folder.rglob("*") if path.is_file()]
        counts = _is_not_hidden
    return sorted(path for path in files if counts(path.relative_to(folder)))


def _is_of_a_model(path) -> bool:
    is_of_a_model = OF_A_MODEL.fullmatch(path.name) and not OF_A_RUN.fullmatch(path.name)
    return bool(is_of_a_model) and _is_not_hidden(path)


def _is_not_hidden(path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _of_file(path) -> str:
    """The SHA-256 of a file."""
    stat = path.stat()
    if stat.st_size < LARGE:
        return _hashed(path)
    # a copy may bring its old mtime along, never its ctime
    return _hashed_once(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _hashed(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _hashed_once(path, *version) -> str:
    return _hashed(path)


@cache
def _commit(name):
    """The commit of a hub id that would be loaded. It is asked for once, so that a run has one."""
    try:
        return model_info(name, timeout=TIMEOUT).sha
    except HFValidationError:  # no name that a hub could have
        return None
    except Exception as error:  # offline, gated, unknown: the hub's errors share no base class
        logger.debug("%s: %s", name, error)
    for file in (
        "config.json",
        "adapter_config.json",
        "tokenizer_config.json",
    ):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


# --- rows that survive a kill ---------------------------------------------------------------------


def read_json_lines(path: str | Path) -> list[Row]:
    """The rows of a file that a run of ours wrote, an object a line; it may be empty.

    Raises:
        UserError: the file is not there, or a line is no object.
    """
    path = Path(path)
    rows: list[Row] = []
    if path.is_file() and path.stat().st_size == 0:
        return rows
    for where, row in read_rows(path, suffix=".jsonl"):
        if isinstance(row, UserError):
            raise UserError(f"{row}; remove the file")
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {row!r:.40}; remove the file")
        rows.append(row)
    return rows


class KeptRows(UserDict[str, Row]):
    """The rows of an append-only file of JSON lines by key; of rows with one key, the last.

    What is appended has reached the operating system when `append` returns. So a kill loses at most
    the row that is being written: its line, cut off, is taken away when the file is opened again.
    One process at a time can open a file. `append` alone adds rows.
    """

    def __init__(self, path: str | Path, key: str = "key"):
        """Open the file, or begin it.

        Args:
            key: the field that holds a row's key, a string.

        Raises:
            UserError: another process has it open, or it holds something else than such rows.
        """
        super().__init__()
        self.path = Path(path)
        self.key = key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._cut_half_a_line()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or choose another folder"
            raise UserError(f"{self.path}: another run writes this file; {hint}") from None
        except OSError as error:  # a file system without locks
            logger.warning("%s: no lock (%s); start no second run on it.", self.path, error)

    def _read(self) -> None:
        for row in read_json_lines(self.path):
            key = row.get(self.key)
            if not isinstance(key, str):
                hint = "it is no file of an interrupted run; remove it"
                raise UserError(f"{self.path}: a row has no field {self.key}; {hint}")
            self.data[key] = row

    def _cut_half_a_line(self) -> None:
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def missing(
        self,
        keys: Iterable[str],
        again: Callable[[Row], bool] | None = None,
    ) -> list[str]:
        """The keys without a row, in their order and each once.

        Args:
            again: whether a row that is there is to be made again, as the error of a server is.
        """
        found = []
        for key in dict.fromkeys(keys):
            row = self.data.get(key)
            if row is None or (again is not None and again(row)):
                found.append(key)
        return found

    def append(self, row: Row) -> None:
        """Keep a row. One that is there already, with the same fields, is not written again.

        Raises:
            ValueError, TypeError: it holds NaN, or something that JSON does not have.
        """
        key = row[self.key]
        if self.data.get(key) == row:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        # First, so that Ctrl-C in the middle of writing finds counted what closing still writes.
        self.data[key] = row
        self._file.write(line.encode())
        self._file.flush()

    def fill(
        self,
        keys: Sequence[str],
        make: Callable[[int, list[str]], Iterable[Row]],
        *,
        size: int,
        together: bool = True,
        again: Callable[[Row], bool] | None = None,
        title: str | None = None,
        unit: str = "row",
    ) -> list[Row]:
        """The rows of `keys`, in their order. What is missing is made, and kept as it comes.

        The keys are cut into chunks, which depend on `keys` and `size` alone. So a job that goes on
        after a kill has the chunks that it had before.

        Args:
            make: is given the number of a chunk and keys of it, and yields their rows as they come.
            size: keys in a chunk.
            together: whether the rows of a chunk depend on each other, as those of one batch do: by
                a seed, or by a rounding error. Then a chunk with a missing row is made whole, and
                what is kept of it stays. Otherwise the missing ones alone are made.
            again: whether a row is to be made again by the next call, as an error is.
            title: what the progress bar calls the job.
            unit: what it calls a row.

        Raises:
            Stopped: Ctrl-C. What came before it is kept.
        """
        order = list(dict.fromkeys(keys))
        starts = range(0, len(order), size)
        hidden = not self.missing(order, again)
        with tqdm(total=len(order), desc=title, unit=unit, disable=hidden) as bar:
            try:
                for number, start in enumerate(starts):
                    chunk = order[start : start + size]
                    wanted = self.missing(chunk, again)
                    bar.update(len(chunk) - len(wanted))
                    asked = wanted
                    if together and self.missing(chunk):
                        asked = chunk
                    if not asked:
                        continue
                    for row in make(number, asked):
                        if row[self.key] in wanted:
                            self.append(row)
                            bar.update()
            except KeyboardInterrupt:
                kept = len(order) - len(self.missing(order))
                said = f"after {kept} of {len(order)} {unit}s, kept in {self.path}; to go on"
                raise Stopped(said) from None
        return [self.data[key] for key in keys]

    def __enter__(self) -> "KeptRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # another process may open it now


def failed(row: Row) -> bool:
    """Whether a row is an error: `again` for rows that have a field `error`."""
    return row["error"] is not None


# --- answers --------------------------------------------------------------------------------------

Ask = Callable[[int, Sequence[list[int]]], Iterable[tuple[int, Completion]]]


def generate(
    ask: Ask,
    prompts: Sequence[list[int]],
    partial: Path,
    salt: Any = None,
    *,
    size: int | None = None,
) -> list[Completion]:
    """The completions of `prompts`, in their order. What an interrupted call kept is not asked
    again, but for errors.

    Args:
        ask: is given the number of a batch and its prompts as token ids, and yields (index of the
            prompt, completion) as they come, as `Engine.complete` does. It is not called where
            nothing is missing.
        partial: where the completions are kept, each for its prompt and `salt`.
        salt: whatever else a completion depends on (model, decoding, size), JSON-like.
        size: prompts of a batch. One that a kill cut is asked as a whole, because its prompts share
            a seed, or a rounding error. None: completions do not depend on each other.
    """
    keys = []
    prompt_of = {}
    for ids in prompts:
        key = digest([salt, ids])
        keys.append(key)
        prompt_of[key] = ids
    # The longest first, as engines take them: then a batch is one of an engine's own.
    order = sorted(prompt_of, key=lambda key: -len(prompt_of[key]))

    def make(number: int, asked: list[str]) -> Iterator[Row]:
        some = [prompt_of[key] for key in asked]
        for i, said in ask(number, some):
            yield {"key": asked[i], "answer": said.text, "error": said.error}

    with KeptRows(partial) as kept:
        done = len(order) - len(kept.missing(order, failed))
        if done:
            logger.info("%d of %d answers are there already.", done, len(order))
        kept.fill(
            order,
            make,
            size=size or max(1, len(order)),
            together=size is not None,
            again=failed,
            unit="answer",
        )
        rows = [kept[key] for key in keys]
    return [Completion(row["answer"], row["error"]) for row in rows]
