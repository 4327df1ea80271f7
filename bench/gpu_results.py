"""The table of gpu.py: what became of each step, as JSON and as markdown."""

import importlib.metadata
import json
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_plan import ROOT

LIBRARIES = (
    "vllm",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "kernels",
    "liger-kernel",
)
HIDDEN = ("said", "kernels", "losses")  # figures that the table has no place for


@dataclass
class Row:
    """A step, and what became of it: done, failed, killed, missing (a library), left out."""

    step: str
    what: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    aim: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def versions() -> list[tuple[str, str, str]]:
    """Library, what is installed, and what this repository was tested with."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pins = dict.fromkeys(LIBRARIES, "not pinned")
    for pin in wanted:
        name, _, version = pin.partition("==")
        if pin in project["dependencies"] or name in LIBRARIES:
            pins[name] = version
    found = []
    for name, pin in sorted(pins.items()):
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "not installed"
        found.append((name, here, pin))
    return found


def write_results(folder: Path, rows: Sequence[Row]) -> None:
    """results.json and results.md, each whole or not there."""
    content = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(content, indent=2)
    replace_file(folder / "results.json", text + "\n")
    replace_file(folder / "results.md", in_words(rows))


def replace_file(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def in_words(rows: Sequence[Row]) -> str:
    """The results as markdown: steps, kernels, versions."""
    title = rows[0].figures.get("device", "a machine that torch does not know")
    lines = [f"# GPU check: {title}", ""]
    lines += table_line("step", "status", "found", "aim", "s")
    lines += table_line("---", "---", "---", "---", "---")
    for row in rows:
        status = f"{row.status}: {row.reason}" if row.reason else row.status
        found = shown(row.figures)
        lines += table_line(
            f"{row.step} ({row.what})", status, found, row.aim, f"{row.seconds:.0f}"
        )
    for row in rows:
        if "kernels" in row.figures:
            lines += ["", f"## What takes longest in a step of {row.step}", ""]
            lines += table_line("kernel", "ms", "share")
            lines += table_line("---", "---", "---")
            for one in row.figures["kernels"]:
                lines += table_line(one["kernel"], f"{one['ms']:.1f}", f"{one['share']:.0%}")
    lines += ["", "## Versions", ""]
    lines += table_line("library", "here", "tested")
    lines += table_line("---", "---", "---")
    for name, here, pin in versions():
        tested = "the same" if here == pin else pin
        lines += table_line(name, here, tested)
    return "\n".join(lines) + "\n"


def table_line(*cells: str) -> list[str]:
    clean = []
    for cell in cells:
        line = " ".join(cell.split())
        clean.append(line.replace("|", "/"))
    inner = " | ".join(clean)
    return [f"| {inner} |"]


def shown(figures: Mapping[str, Any]) -> str:
    """Figures in a line: three digits, and of the losses the first and the last."""
    parts = []
    for name, value in figures.items():
        if name in HIDDEN or value is None:
            continue
        if isinstance(value, float):
            digits = ".0f" if abs(value) >= 1000 else ".3g"
            value = format(value, digits)
        parts.append(f"{name} {value}")
    losses = figures.get("losses")
    if losses and None not in losses:
        parts.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return ", ".join(parts)
