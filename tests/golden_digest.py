"""What golden.py writes down of a run's files, and how it compares two records."""

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Differs between two runs of the same code, at any depth of a JSON file.
VOLATILE = {"versions", "git", "hardware", "seconds", "peak_memory_gib", "time", "timestamp"}
VOLATILE |= {"transformers_version", "train_runtime", "eval_runtime", "version"}
VOLATILE |= {"identity"}  # of a guard in kept verdicts: the times of its files are part of it
IDENTITY = re.compile("[0-9a-f]{32}")
TIMES = re.compile(r"\d{8}_\d{6}")  # in the name of a file
UNREAD = (".bin", ".pt", ".pth", ".lock")  # pickles, whose content is not read
# Of these the content is written down, not only a checksum; but not under checkpoints.
RESULTS = re.compile(r"(results|guard|run|probe|process_stats)\.json|(predictions|replies)\.jsonl")
ANSWERS_OF = re.compile(r"cross_task-answers.*/test_\w+\.json")
PASSING = re.compile(r"(checkpoint|epoch)-\d")
# Parts of results that the checksum alone covers: they are long, and follow from the rest.
LONG = {"arguments", "command", "run", "intervals", "spread", "seeds", "comparisons", "groups"}
LONG |= {"instructions", "by_parse_errors", "convention"}
PER_LABEL = re.compile("eval_.+/.+")  # the same of a training log


def checksum(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_digest(folder: Path) -> dict[str, Any]:
    """The digests of a folder's files by their names, in which a time is "<time>"."""
    names = {TIMES.sub("<time>", str(path.relative_to(folder))): path for path in files(folder)}
    return {name: digest(path) for name, path in names.items()}


def digest(path: Path) -> Any:
    """A checksum of a file, and its content where that is a result or a model."""
    if path.suffix in UNREAD:
        return "not read"
    passing = PASSING.search(str(path))
    if path.suffix == ".safetensors":
        tensors = {name: tensor_digest(t) for name, t in sorted(load_file(path).items())}
        short = {"sha256": checksum(json.dumps(tensors).encode())}
        return short if passing else short | {"tensors": tensors}
    if path.suffix not in (".json", ".jsonl"):
        return {"sha256": checksum(path.read_bytes())}
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    content = [stable(json.loads(line)) for line in lines]
    short = {"sha256": checksum(json.dumps(content).encode())}
    if passing or not (RESULTS.fullmatch(path.name) or ANSWERS_OF.search(str(path))):
        return short
    if path.name == "predictions.jsonl":
        return short | {"scores": [list(floats(row)) for row in content]}
    return short | {"content": readable(content)}


def tensor_digest(tensor: torch.Tensor) -> list:
    """Shape, sum, sum of absolute values, and a checksum of the bytes."""
    double = tensor.double()
    sums = [float(f"{x.item():.4g}") for x in (double.sum(), double.abs().sum())]
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return [str(list(tensor.shape)), *sums, f"sha256 {checksum(content)}"]


def stable(value: Any) -> Any:
    """Without what differs between two runs of the same code."""
    if isinstance(value, dict):
        keys = [key for key in value if key not in VOLATILE and not key.endswith("_per_second")]
        keys = [key for key in keys if key != "guard" or not IDENTITY.fullmatch(str(value[key]))]
        return {key: stable(value[key]) for key in keys}
    return [stable(each) for each in value] if isinstance(value, list) else value


def readable(value: Any) -> Any:
    """Floats with six digits, the beginning of long texts, and no long parts."""
    if isinstance(value, dict):
        kept = [key for key in value if key not in LONG and not PER_LABEL.fullmatch(key)]
        return {key: readable(value[key]) for key in kept}
    if isinstance(value, list):
        return [readable(each) for each in value]
    if isinstance(value, str) and len(value) > 80:
        return f"{value[:20]} … sha256 {checksum(value.encode())}"
    return float(f"{value:.6g}") if isinstance(value, float) else value


def floats(value: Any) -> Iterator[float]:
    """All floats in it, with six digits."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from floats(each)
    elif isinstance(value, float):
        yield readable(value)


def differences(one: Any, other: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """A line for each place where two records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                yield f"{where}{key}: only in the {'first' if key in one else 'second'}"
            elif not (tolerance and key == "sha256"):
                yield from differences(one[key], other[key], tolerance, f"{where}{key}: ")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, tolerance, f"{where}{i}: ")
    elif one != other and not near(one, other, tolerance):
        yield f"{where}{one!r:.200} is not {other!r:.200}"


def near(one: Any, other: Any, tolerance: float) -> bool:
    """Numbers within the tolerance, or two checksums when there is one."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= tolerance * max(1, abs(one), abs(other))
    return tolerance > 0 and str(one)[:7] == str(other)[:7] == "sha256 "


def text_of(found: dict[str, Any]) -> str:
    """The record as JSON, a line a file."""
    dense, parts = json.JSONEncoder(separators=(",", ":")), []
    for name, run in found.items():
        lines = [f"  {json.dumps(key)}: {dense.encode(value)}" for key, value in run.items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
