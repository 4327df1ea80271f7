"""Fire command lines that are read and checked before any work.

Fire by itself calls the function first and complains of a misspelt flag afterwards, when a night on
eight GPUs is over (google/python-fire#168), and takes `--max_new_tokens 8x` for text.
"""

import inspect
import io
import logging
import os
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import fire
from fire.decorators import SetParseFn

from common.conversation import UserError
from common.run import expand_home, read_config, run_cli

logger = logging.getLogger(__name__)


def run(function: Callable[..., None], default_config: Path | None = None) -> None:
    """Call a function of keyword-only parameters with `--config file.yaml` and flags; flags win.

    Args:
        default_config: the config that is used when there is no argument at all.
    """
    run_cli(lambda: function(**parse(function, sys.argv[1:], default_config)))


def parse(
    function: Callable[..., None], argv: list[str], default_config: Path | None = None
) -> dict[str, Any]:
    """The values for `function`, each of the type that it is annotated with.

    Raises:
        UserError: an unknown flag or key, a value of another type, a required one that is absent.
    """
    parameters = inspect.signature(function).parameters
    if not argv and default_config is not None:
        logger.info(
            "No arguments: running %s (for the paper's run: --config configs/paper.yaml)",
            os.path.relpath(default_config),
        )
        argv = [f"--config={os.path.relpath(default_config)}"]
        sys.argv += argv  # for run.json, and for the command that goes on after Ctrl-C
    given = _flags(function, argv)
    config, values = given.pop("config", None), {}
    if config is not None:
        values = {
            name: (f"--config {config}: {name}", value)
            for name, value in _read(Path(expand_home(config))).items()
        }
    values |= {name: (f"--{name}", value) for name, value in given.items()}
    hints, bound = get_type_hints(function), {}
    for name, (where, value) in values.items():
        if name not in parameters:
            raise UserError(f"{where}: unknown; --help lists the flags")
        bound[name] = _convert(value, hints[name], where)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and bound.get(name) is None:
            raise UserError(f"--{name}: is needed; --help lists the flags")
    return bound


def _flags(function: Callable[..., None], argv: list[str]) -> dict[str, str]:
    """What fire reads from the command line, as text."""
    found: dict[str, str] = {}

    def record(**values):
        found.update(values)

    known = [
        p.replace(kind=p.KEYWORD_ONLY, default=None if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
    ]
    config = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None
    )
    record.__signature__ = inspect.Signature([config, *known])
    record.__name__, record.__doc__ = function.__name__, function.__doc__
    said, asks = io.StringIO(), {"--help", "-h"} & set(argv)
    try:
        with redirect_stderr(said):
            fire.Fire(
                SetParseFn(str)(record),
                command=["--help"] if asks else argv,
                name=Path(sys.argv[0]).name,
            )
    except fire.core.FireExit as left:
        if left.code:
            lines = [line for line in said.getvalue().splitlines() if line.startswith("ERROR:")]
            raise UserError(f"{' '.join(lines)[7:] or argv}; --help lists the flags") from None
        print(said.getvalue(), end="")
        raise
    return found


def _read(path: Path) -> dict[str, Any]:
    config = read_config(path)
    if not isinstance(config, dict):
        raise UserError(f"--config {path}: expected names with values, found {config!r:.60}")
    return config


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value`, text or YAML's, as `kind`."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None or (value in ("None", "null", "") and type(None) in kinds):
        return None
    (kind,) = [k for k in kinds if k is not type(None)]
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else str(value).strip("[]() ").split(",")
        return [
            _convert(str(item).strip(" '\""), get_args(kind)[0], where)
            for item in items
            if str(item).strip()
        ]
    text = str(value).strip() if kind is not str else str(value)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        # what fire makes of a bare flag
        if kind is str and where.startswith("--") and value in ("True", "False"):
            raise ValueError
        return expand_home(kind(text))
    except (ValueError, KeyError):
        raise UserError(
            f"{where} {value}: expected {'text' if kind is str else kind.__name__}"
        ) from None
