"""What many tests do: write and read rows, and look for an error of one line."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.conversation import UserError


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A file of JSON lines; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    """The rows of a file of JSON lines; a line may hold other line breaks than "\\n"."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def user_error(words: str = "") -> Iterator[pytest.ExceptionInfo[UserError]]:
    """What is refused in one line; `words` is a regular expression that it holds."""
    with pytest.raises(UserError, match=words or None) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def change_card(folder: Path, without: str | None = None, **changes: Any) -> None:
    """Change a folder's guard.json by hand, as a user can."""
    path = folder / "guard.json"
    card = read_json(path) | changes
    card.pop(without, None)
    path.write_text(json.dumps(card), encoding="utf-8")
