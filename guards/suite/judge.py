"""What is judged and by whom, and the verdicts, kept as they come so that a killed run goes on."""

import gc
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from common import data, metrics
from common.conversation import UserError, Verdict, check_url, last_turns, pair
from common.data import parse_spec
from common.run import expand_home, write_json
from common.templates import template_text
from guards import Guard, load_guard, zoo
from guards.suite.benchmarks import Benchmark, benchmark_names, is_benchmark, load_benchmark

logger = logging.getLogger("suite")
TASKS = {"prompt": "prompt_unsafe", "response": "response_unsafe", "refusal": "response_refusal"}
PAPER = {  # what the paper's evaluation runs; it runs no refusal task
    "prompt": (
        *("expguardtest_prompt", "toxicchat", "openai_moderation", "xstest_prompt", "harmbench_prompt"),
        *("aegis2_prompt", "wildguardtest_prompt"),
    ),
    "response": (
        *("expguardtest_response", "beavertails", "saferlhf", "harmbench_response", "aegis2_response"),
        "wildguardtest_response",
    ),
    "refusal": ("wildguardtest_refusal", "xstest_response_refusal"),
}
SERVED = ("engine", "server_url", "server_model", "server_timeout")
PATIENCE = {"server_timeout"}  # options that verdicts do not depend on
NOT_FOR = {"generative": (), "api": (*SERVED, "trust_remote_code")}  # kind of guard: options for all that it has not
WEIGHTS = (".safetensors", ".bin", ".json", ".model", ".jinja", ".py")  # files that verdicts depend on
NOT_SUPPORTED = {"status": "not supported", "reason": "the guard does not judge this label"}


@dataclass(frozen=True)
class Candidate:
    """A guard to be evaluated. Kept verdicts are taken for its `identity` alone."""

    name: str
    spec: str
    identity: str
    load: Callable[[], Guard]
    zoo: str | None = None  # its name there
    released: bool = False  # it is the zoo's model itself, not one that was trained like it


def candidates(specs: Sequence[str], options: Mapping[str, Any]) -> list[Candidate]:
    """The guards that specs name. Whether they load is seen when it is their turn.

    Args:
        specs: name of the zoo, hub id, folder or name=folder, each with `:option=value,…` of its own.
        options: of `load_guard`, for all of them whose kind takes them.

    Raises:
        UserError: a name that is given to no folder, or to a folder that does not say what guard it holds; a URL with a
            password or a key.
    """
    out = []
    for text in specs:
        spec, own = re.fullmatch(r"(.*?)(?::(\w+=.*))?", text).groups()
        pairs = (option.partition("=") for option in (own or "").split(",") if option)
        given = {key: yaml.safe_load(value) for key, _, value in pairs}
        for key in {"server_url", "base_url"} & set(given):  # the spec stands in results.json
            check_url(given[key], f"--guards {spec}, {key}")
        spec = expand_home(spec)
        name, folder = (None, spec) if Path(spec).exists() or "=" not in spec else spec.split("=", 1)
        folder = expand_home(folder)
        described, card = (Path(folder) / "guard.json").is_file(), _read_card(Path(folder))
        if name and not Path(folder).is_dir():
            raise UserError(f"--guards {text}: {folder} is no folder")
        if name and not described and name not in zoo():
            raise UserError(f"--guards {text}: {folder} has no guard.json, and {name} is no name of the guard zoo")
        spec, given = (name, given | {"model": folder}) if name and not described else (folder, given)
        known = {name or spec, str(card.get("guard"))}
        entry = next((key for key, e in zoo().items() if {key, e.get("adapter", e.get("model"))} & known), None)
        about = zoo().get(str(card.get("guard")) if described else entry, {}) | card
        unwanted = NOT_FOR.get(str(about.get("kind")), SERVED)
        given = {key: value for key, value in options.items() if key not in unwanted} | given
        shown = name or ("/".join(Path(spec).parts[-2:]) if described else entry or spec)
        asked = {key: value for key, value in given.items() if key not in PATIENCE}
        seen = [spec, asked, fingerprint(Path(folder)), zoo().get(entry), made_of(about | given)]
        identity = hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:32]
        load = lambda spec=spec, given=given: load_guard(spec, **given, progress=False)  # noqa: E731
        shown = f"{shown} ({own})" if own else shown
        out.append(Candidate(shown, text, identity, load, entry, released=not described and entry is not None))
    return out


def _read_card(folder: Path) -> dict[str, Any]:
    """A folder's guard.json, empty where there is none; a broken one says so when it is loaded."""
    try:
        card = json.loads((folder / "guard.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def made_of(about: Mapping[str, Any]) -> list:
    """What a guard's verdicts depend on beside its own folder: the texts of its prompt, local adapter and base model.

    Args:
        about: its entry of the zoo or its guard.json, and its options.
    """
    names = [about.get("template", "beavertails")]  # a classifier's, where nothing is said
    names += [message["content_file"] for message in about.get("messages", ()) if "content_file" in message]
    parts = [fingerprint(Path(str(about.get(key)))) for key in ("model", "adapter", "base_model")]
    for name in names:
        with suppress(UserError):  # an unknown one says so when the guard is loaded
            parts.append(template_text(str(name)))
    return parts


def fingerprint(folder: Path) -> list | None:
    """guard.json, and what tells other weights apart without reading them; None if it is no folder."""
    if not folder.is_dir():
        return None
    card = folder / "guard.json"
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    known = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return [card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None, known]


def read_benchmarks(
    specs: Sequence[str], task_type: str | None, max_rows: int | None
) -> tuple[list[Benchmark], dict[str, str]]:
    """The benchmarks of the asked task, and what became of those that the hub did not give.

    Raises:
        UserError: unknown name, bad local file, nothing left.
    """
    tasks = ("prompt", "response") if task_type in (None, "both") else (task_type,)
    known, out, unread = benchmark_names(), {}, {}
    if not specs:
        specs = [name for task in tasks for name in PAPER[task]]
    elif task_type:
        asked = {name for task in tasks for name in benchmark_names(TASKS[task])}
        specs = [s for s in specs if s.partition("@")[0] in asked or s.partition("@")[0] not in known]
    for spec in specs:
        try:
            benchmark = load_benchmark(spec, max_rows=max_rows)
        except UserError as error:
            if spec not in known:  # a file or a name, which the user can mend
                raise
            unread[spec] = str(error)
            logger.error("%s", error)
            continue
        if benchmark.name in out:
            raise UserError(f"--benchmarks {spec}: {benchmark.name} stands there twice")
        out[benchmark.name] = benchmark
    if not out:
        raise UserError("--benchmarks: none could be read" if unread else f"--task_type {task_type}: none is left")
    return list(out.values()), unread


def read_validation(specs: Sequence[str], benchmarks: Sequence[str], labels: set[str]) -> dict[str, Benchmark]:
    """The rows to fit thresholds on, by label.

    Raises:
        UserError: a test split, a benchmark, or rows of one class only.
    """
    files = {Path(spec.partition("@")[2]).expanduser().resolve() for spec in benchmarks if "@" in spec}
    rows: dict[str, list[dict]] = {label: [] for label in sorted(labels)}
    for spec in specs:
        file = spec.partition("@")[2] if is_benchmark(spec) else spec
        path = Path(parse_spec(file).name).resolve() if file else None
        if not file or metrics.is_test(file) or path in files:
            raise UserError(f"--validation {spec}: is test data; a threshold is fitted on other rows")
        if is_benchmark(spec):
            benchmark = load_benchmark(spec)
            rows.get(benchmark.label, []).extend(benchmark.rows)
            continue
        for row in data.load_conversations(spec):
            for label in rows:
                if row[label] is not None:
                    prompt, response = last_turns(row["messages"])
                    messages = pair(prompt) if label == "prompt_unsafe" else pair(prompt, response)
                    key = hashlib.sha256(json.dumps([label, messages]).encode()).hexdigest()
                    rows[label].append({"id": key, "messages": messages, "label": row[label], "groups": {}})
    out = {}
    for label, found in rows.items() if specs else ():
        if not found:
            logger.warning("--validation: no row has %s; its benchmarks get no threshold.", label)
        elif len({row["label"] for row in found}) < 2:
            raise UserError(f"--validation: all {len(found)} rows with {label} have one class; a threshold needs both")
        else:
            out[label] = Benchmark(f"validation-{label}", label, found, {})
    return out


def judge_all(
    candidate: Candidate, benchmarks: Sequence[Benchmark], folder: Path, chunk: int, overwrite: bool = False
) -> tuple[dict[str, list[Verdict]], dict[str, dict], dict]:
    """One guard's verdicts on each benchmark. It is loaded once, only if rows are missing, and freed.

    Args:
        folder: where its verdicts are kept: `<benchmark>.jsonl`, and `card.json` with what it judges.
        chunk: rows between two writes. overwrite: judge anew what is kept.

    Returns:
        verdicts by benchmark; for the other benchmarks, status ("failed", "not supported") and reason; what is kept
        of the guard itself: its thresholds, and what it sees of a conversation.
        What a guard raises is not raised: one that fails must not stop the others.
    """
    folder = folder / re.sub(r"[^\w.=-]+", "_", candidate.name)
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    card, broken, guard = _card(folder / "card.json", candidate.identity), None, None
    verdicts, problems = {}, {}
    kept = {b.name: read_kept(folder / f"{b.name}.jsonl", candidate.identity) for b in benchmarks}
    missing = {b.name: _missing(b.rows, kept[b.name]) for b in benchmarks}
    if card is None or any(missing[b.name] for b in benchmarks if b.label in card["judges"]):
        try:
            guard = candidate.load()
            thresholds = getattr(guard, "thresholds", None) or {}
            card = {"identity": candidate.identity, "judges": list(guard.judges), "thresholds": thresholds}
            card["sees"] = guard.sees
            write_json(folder / "card.json", card)
        except Exception as error:  # whatever a guard can raise
            broken = _one_line(error, f"{candidate.name} does not load")
    for b in benchmarks:
        if card is not None and b.label not in card["judges"]:
            problems[b.name] = NOT_SUPPORTED
        elif broken and (card is None or missing[b.name]):
            problems[b.name] = {"status": "failed", "reason": broken}
        else:
            path = folder / f"{b.name}.jsonl"
            try:
                kept[b.name] |= judge_rows(guard, missing[b.name], path, candidate, kept[b.name], chunk)
                verdicts[b.name] = [kept[b.name][row["id"]] for row in b.rows]
                if all(v.error is not None for v in verdicts[b.name]):
                    raise UserError(f"not one row could be judged: {verdicts.pop(b.name)[0].error}")
            except Exception as error:
                reason = _one_line(error, f"{candidate.name} on {b.name}")
                problems[b.name] = {"status": "failed", "reason": reason}
    guard = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return verdicts, problems, card or {}


def judge_rows(
    guard: Guard | None, rows: Sequence[Mapping], path: Path, candidate: Candidate, kept: Mapping, chunk: int
) -> dict[str, Verdict]:
    """Verdicts on `rows` by id, each chunk written to `path` before the next is judged."""
    out: dict[str, Verdict] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{candidate.name} on {path.stem}"
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(rows), desc=title, disable=not rows) as bar:
        for part in (rows[i : i + chunk] for i in range(0, len(rows), chunk)):
            said = guard.judge([row["messages"] for row in part])
            fresh = {row["id"]: verdict for row, verdict in zip(part, said, strict=True)}
            lines = [
                {"id": key, "guard": candidate.identity, "verdict": asdict(verdict)}
                for key, verdict in fresh.items()
                if verdict != kept.get(key)  # the same error again
            ]
            file.write("".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
            file.flush()
            out |= fresh
            bar.update(len(part))
    return out


def read_kept(path: Path, identity: str) -> dict[str, Verdict]:
    """Kept verdicts of one guard by row id, the last of each; a last line that a kill cut off is taken away.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        return {line["id"]: Verdict(**line["verdict"]) for line in lines if line["guard"] == identity}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the verdicts of an interrupted run ({error!r:.80}); remove it") from None


def _missing(rows: Sequence[Mapping], kept: Mapping[str, Verdict]) -> list[Mapping]:
    """Rows without a kept verdict, or with an error for one; each conversation once."""
    asked = {row["id"]: row for row in rows if row["id"] not in kept or kept[row["id"]].error is not None}
    return list(asked.values())


def _card(path: Path, identity: str) -> dict[str, Any] | None:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if card.get("identity") == identity else None


def _one_line(error: Exception, what: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    logger.error("%s: %s", what, reason, exc_info=None if isinstance(error, UserError) else error)
    return f"{reason:.300}"
