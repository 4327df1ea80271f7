"""What many tests do: write and read rows, and look for an error of one line."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import scripts
import torch
from safetensors.torch import load_file

from common.conversation import UserError


def cases(names: str, table: Mapping[str, Any]) -> pytest.MarkDecorator:
    """One test for each row of a table, whose key says what is special or wrong in it."""
    return pytest.mark.parametrize(names, table.values(), ids=table)


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


def logged(folder: Path, name: str) -> dict[int, float]:
    """What a training logged under a name, by step."""
    log = read_json(folder / "run.json")["log"]
    return {entry["step"]: entry[name] for entry in log if name in entry}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The greatest difference of two sets of weights, or of gradients."""
    assert set(one) == set(other)
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


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


def flip_a_bit(path: Path) -> None:
    """Change one byte in the midst of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def kill_when_written(path: Path, command: Sequence, folder: Path) -> None:
    """Run a script in its folder, and kill it as soon as it has written something to a file."""
    process = scripts.start([sys.executable, *command], cwd=folder)
    scripts.wait_until_written(path, process)
    process.kill()
    process.wait()
