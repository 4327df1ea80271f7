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


def run(function: Callable, default_config: Path | None = None, kind: type | None = None) -> None:
    """Call a function with `--config file.yaml` and flags, which are its own or a dataclass's."""
    run_cli(lambda: function(**parse(kind or function, sys.argv[1:], default_config)))


def parse(target: Callable, argv: list[str], default_config: Path | None = None) -> dict[str, Any]:
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
    for prefix, given in ((f"--config {path}: ", config), ("--", flags)):
        for name, value in given.items():
            if name not in parameters:
                raise UserError(f"{prefix}{name}: unknown; --help lists the flags")
            values[name] = converted(value, kinds[name], prefix + name)
    for name, parameter in parameters.items():
        if parameter.default is Parameter.empty and values.get(name) is None:
            raise UserError(f"--{name}: is needed; --help lists the flags")
    return values


def read_flags(target: Callable, argv: list[str]) -> dict[str, str]:
    """What fire reads from the command line, as text."""
    found: dict[str, str] = {}
    parameters = [Parameter("config", Parameter.KEYWORD_ONLY, default=None)]
    for one in signature(target).parameters.values():
        default = None if one.default is Parameter.empty else one.default
        parameters.append(one.replace(kind=Parameter.KEYWORD_ONLY, default=default))

    @wraps(target)
    def record(**values: str) -> None:
        found.update(values)

    record.__signature__ = Signature(parameters)
    command = ["--help"] if {"--help", "-h"} & set(argv) else argv
    said = StringIO()
    try:
        with redirect_stderr(said):
            fire.Fire(SetParseFn(str)(record), command=command, name=Path(sys.argv[0]).name)
    except fire.core.FireExit as left:
        if not left.code:
            print(said.getvalue(), end="")
            raise
        lines = [line for line in said.getvalue().splitlines() if line.startswith("ERROR:")]
        raise UserError(f"{' '.join(lines)[7:] or argv}; --help lists the flags") from None
    return found


def converted(value: Any, kind: Any, where: str) -> Any:
    """A value, text or YAML's, as `kind`."""
    optional = NoneType in get_args(kind)
    if value is None or (optional and value in ("None", "null", "")):
        return None
    text = expand_home(str(value))
    if "list" in str(kind):
        items = value if isinstance(value, list) else text.strip("[]() ").split(",")
        words = [str(item).strip(" '\"") for item in items]
        text = [expand_home(word) for word in words if word]
    name = re.search("int|float|bool|str", str(kind))[0].replace("str", "text")
    bare = name == "text" and where.startswith("--") and value in ("True", "False")
    try:
        if not bare:
            return TypeAdapter(kind).validate_python(text)
    except ValidationError:
        pass
    raise UserError(f"{where} {value}: expected {name}")
