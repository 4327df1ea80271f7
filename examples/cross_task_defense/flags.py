"""Fire command lines that are read and checked before any work.

Fire by itself calls the function first and complains of a misspelt flag afterwards, when a night on
eight GPUs is over (google/python-fire#168), and takes `--max_new_tokens 8x` for text.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import wraps
from inspect import Parameter, Signature, signature
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import fire
from fire.decorators import SetParseFn
from pydantic import TypeAdapter, ValidationError

from common.conversation import UserError
from common.run import expand_home, read_config, run_cli

logger = logging.getLogger(__name__)


def run(
    function: Callable,
    default_config: Path | None = None,
    kind: type | None = None,
) -> None:
    """Call a function with `--config file.yaml` and flags, which are its own or a dataclass's."""

    def main() -> None:
        values = parse(kind or function, sys.argv[1:], default_config)
        function(**values)

    run_cli(main)


def parse(
    target: Callable,
    argv: list[str],
    default_config: Path | None = None,
) -> dict[str, Any]:
    """The values for a function or a dataclass, each of the type that it is annotated with; a
    UserError for an unknown flag, a value of another type, or a required one that is absent.
    """
    if not argv and default_config is not None:
        path = os.path.relpath(default_config)
        logger.info("No arguments: running %s (the paper's: --config configs/paper.yaml)", path)
        argv = [f"--config={path}"]
        sys.argv += argv  # for run.json, and for the command that goes on after Ctrl-C
    flags = read_flags(target, argv)
    path = expand_home(flags.pop("config", None))
    config = {} if path is None else read_config(path)
    if not isinstance(config, dict):
        raise UserError(f"--config {path}: expected names with values, found {config!r:.60}")
    kinds = get_type_hints(target)
    parameters = signature(target).parameters
    values = {}
    sources = [
        (f"--config {path}: ", config),
        ("--", flags),  # later, so that flags win
    ]
    for prefix, given in sources:
        for name, value in given.items():
            if name not in parameters:
                raise UserError(f"{prefix}{name}: unknown; --help lists the flags")
            values[name] = converted(value, kinds[name], prefix + name)
    for name, parameter in parameters.items():
        is_required = parameter.default is Parameter.empty
        if is_required and values.get(name) is None:
            raise UserError(f"--{name}: is needed; --help lists the flags")
    return values


def read_flags(target: Callable, argv: list[str]) -> dict[str, str]:
    """What fire reads from the command line, as text."""
    found: dict[str, str] = {}
    kind = Parameter.KEYWORD_ONLY
    parameters = [Parameter("config", kind, default=None)]
    for parameter in signature(target).parameters.values():
        default = parameter.default
        if default is Parameter.empty:
            default = None
        parameters.append(parameter.replace(kind=kind, default=default))

    @wraps(target)
    def record(**values: str) -> None:
        found.update(values)

    record.__signature__ = Signature(parameters)
    is_help = "--help" in argv or "-h" in argv
    command = ["--help"] if is_help else argv
    name = Path(sys.argv[0]).name
    said = StringIO()
    try:
        with redirect_stderr(said):
            fire.Fire(SetParseFn(str)(record), command=command, name=name)
    except fire.core.FireExit as left:
        text = said.getvalue()
        if not left.code:
            print(text, end="")
            raise
        reasons = re.findall("^ERROR: (.*)", text, re.MULTILINE)
        reason = " ".join(reasons) or argv
        raise UserError(f"{reason}; --help lists the flags") from None
    return found


def converted(value: Any, kind: Any, where: str) -> Any:
    """A value, text or YAML's, as `kind`."""
    optional = NoneType in get_args(kind)
    if value is None or (optional and value in ("None", "null", "")):
        return None
    wanted = list_of(value) if "list" in str(kind) else expand_home(str(value))
    name = re.search("int|float|bool|str", str(kind))[0].replace("str", "text")
    # fire reads a flag without a value as True or False
    is_bare = where.startswith("--") and value in ("True", "False")
    try:
        if name != "text" or not is_bare:
            return TypeAdapter(kind).validate_python(wanted)
    except ValidationError:
        pass
    raise UserError(f"{where} {value}: expected {name}")


def list_of(value: Any) -> list[str]:
    """The items of a YAML list, or of a text such as "[a, b]" or "a,b"."""
    items = value
    if not isinstance(value, list):
        items = str(value).strip("[]() ").split(",")
    found = []
    for item in items:
        word = str(item).strip(" '\"")
        if word:
            found.append(expand_home(word))
    return found
