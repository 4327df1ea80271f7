"""What is judged and by whom, and the verdicts, kept as they come so that a killed run goes on."""

import gc
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from common import data, metrics
from common.conversation import UserError, Verdict, check_url, last_turns, pair
from common.data import parse_spec
from common.keep import KeptRows, Row, digest
from common.run import expand_home
from guards import Guard, load_guard, zoo
from guards.card import has_card
from guards.identity import described, guard_identity, is_served
from guards.known import zoo_name
from guards.suite.benchmarks import Benchmark, benchmark_names, is_benchmark, load_benchmark, row_id

logger = logging.getLogger("suite")
TASKS = {"prompt": "prompt_unsafe", "response": "response_unsafe", "refusal": "response_refusal"}
PAPER = {  # what the paper's evaluation runs; it runs no refusal task
    "prompt": (
        *(
            "expguardtest_prompt",
            "toxicchat",
            "openai_moderation",
            "xstest_prompt",
            "harmbench_prompt",
        ),
        *("aegis2_prompt", "wildguardtest_prompt"),
    ),
    "response": (
        *(
            "expguardtest_response",
            "beavertails",
            "saferlhf",
            "harmbench_response",
            "aegis2_response",
        ),
        "wildguardtest_response",
    ),
    "refusal": ("wildguardtest_refusal", "xstest_response_refusal"),
}
SERVED = ("engine", "server_url", "server_model", "server_timeout")
# kind of guard: options for all that it has not
NOT_FOR = {"generative": (), "api": (*SERVED, "trust_remote_code")}
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
    served: bool = False  # elsewhere, where a verdict does not depend on what else is asked


def candidates(specs: Sequence[str], options: Mapping[str, Any]) -> list[Candidate]:
    """The guards that specs name. Whether they load is seen when it is their turn.

    Args:
        specs: name of the zoo, hub id, folder or name=folder, each with `:option=value,…` of its
        own.
        options: of `load_guard`, for all of them whose kind takes them.

    Raises:
        UserError: a name that is given to no folder, or to a folder that does not say what guard it
        holds; a URL with a
            password or a key.
    """
    out = []
    for text in specs:
        spec, own = re.fullmatch(r"(.*?)(?::(\w+=.*))?", text).groups()
        pairs = (option.partition("=") for option in (own or "").split(",") if option)
        given = {key: expand_home(yaml.safe_load(value)) for key, _, value in pairs}
        for key in {"server_url", "base_url"} & set(given):  # the spec stands in results.json
            check_url(given[key], f"--guards {spec}, {key}")
        spec = expand_home(spec)
        name, folder = (
            (None, spec) if Path(spec).exists() or "=" not in spec else spec.split("=", 1)
        )
        folder = expand_home(folder)
        has_own_card = has_card(folder)
        if name and not Path(folder).is_dir():
            raise UserError(f"--guards {text}: {folder} is no folder")
        if name and not has_own_card and name not in zoo():
            raise UserError(
                f"--guards {text}: {folder} has no guard.json, and {name} is no name of the guard zoo"
            )
        spec, given = (
            (name, given | {"model": folder}) if name and not has_own_card else (folder, given)
        )
        about = described(spec)
        entry = zoo_name(name or spec) or zoo_name(str(about.get("guard")))
        unwanted = NOT_FOR.get(str(about.get("kind")), SERVED)
        given = {key: value for key, value in options.items() if key not in unwanted} | given
        shown = name or ("/".join(Path(spec).parts[-2:]) if has_own_card else entry or spec)
        identity, served = guard_identity(spec, given), is_served(spec, given)
        load = lambda spec=spec, given=given: load_guard(spec, **given, progress=False)  # noqa: E731
        shown = f"{shown} ({own})" if own else shown
        released = not has_own_card and entry is not None
        out.append(Candidate(shown, text, identity, load, entry, released, served))
    return out


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
        specs = [
            s for s in specs if s.partition("@")[0] in asked or s.partition("@")[0] not in known
        ]
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
        raise UserError(
            "--benchmarks: none could be read"
            if unread
            else f"--task_type {task_type}: none is left"
        )
    return list(out.values()), unread


def read_validation(
    specs: Sequence[str], benchmarks: Sequence[str], labels: set[str]
) -> dict[str, Benchmark]:
    """The rows to fit thresholds on, by label.

    Raises:
        UserError: a test split, a benchmark, or rows of one class only.
    """
    files = {
        Path(spec.partition("@")[2]).expanduser().resolve() for spec in benchmarks if "@" in spec
    }
    rows: dict[str, list[dict]] = {label: [] for label in sorted(labels)}
    for spec in specs:
        file = spec.partition("@")[2] if is_benchmark(spec) else spec
        path = Path(parse_spec(file).name).resolve() if file else None
        if not file or metrics.is_test(file) or path in files:
            raise UserError(
                f"--validation {spec}: is test data; a threshold is fitted on other rows"
            )
        if is_benchmark(spec):
            benchmark = load_benchmark(spec)
            rows.get(benchmark.label, []).extend(benchmark.rows)
            continue
        for row in data.load_conversations(spec):
            for label in rows:
                if row[label] is not None:
                    prompt, response = last_turns(row["messages"])
                    messages = pair(prompt) if label == "prompt_unsafe" else pair(prompt, response)
                    key = row_id(label, messages)
                    rows[label].append(
                        {"id": key, "messages": messages, "label": row[label], "groups": {}}
                    )
    out = {}
    for label, found in rows.items() if specs else ():
        if not found:
            logger.warning("--validation: no row has %s; its benchmarks get no threshold.", label)
        elif len({row["label"] for row in found}) < 2:
            raise UserError(
                f"--validation: all {len(found)} rows with {label} have one class; a threshold needs both"
            )
        else:
            out[label] = Benchmark(f"validation-{label}", label, found, {})
    return out


def judge_all(
    candidate: Candidate,
    benchmarks: Sequence[Benchmark],
    folder: Path,
    chunk: int,
    overwrite: bool = False,
) -> tuple[dict[str, list[Verdict]], dict[str, dict], dict]:
    """One guard's verdicts on each benchmark. It is loaded once, only if rows are missing, and
    freed.

    Args:
        folder: where its verdicts are kept, in `<benchmark>.jsonl`, and in `guards.jsonl` what it
            judges.
        chunk: rows that are judged at a time.
        overwrite: judge anew what is kept.

    Returns:
        verdicts by benchmark; for the other benchmarks, status ("failed", "not supported") and
        reason; what is kept of the guard itself: its thresholds, and what it sees of
        conversations.
        What a guard raises is not raised: one that fails must not stop the others.

    Raises:
        UserError: a file of kept verdicts is broken, or another run writes it.
    """
    folder = folder / re.sub(r"[^\w.=-]+", "_", candidate.name)
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as open_files:
        known = open_files.enter_context(KeptRows(folder / "guards.jsonl", "identity"))
        kept = []
        for benchmark in benchmarks:
            kept.append(KeptVerdicts(candidate, benchmark, folder))
            open_files.enter_context(kept[-1].rows)
        found = _judge(candidate, kept, known, chunk)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


class KeptVerdicts:
    """One guard's verdicts on one benchmark: those that are there, and those that are to come."""

    def __init__(self, candidate: Candidate, benchmark: Benchmark, folder: Path):
        self.candidate, self.benchmark, self.label = candidate, benchmark, benchmark.label
        self.rows = KeptRows(folder / f"{benchmark.name}.jsonl", "id")
        self.keys = [digest([candidate.identity, row["id"]]) for row in benchmark.rows]
        self.row_of = dict(zip(self.keys, benchmark.rows, strict=True))

    def missing(self) -> bool:
        """Whether a row has no verdict, or an error for one."""
        return bool(self.rows.missing(self.keys, _failed))

    def verdicts(self, guard: Guard | None, chunk: int) -> list[Verdict]:
        """The verdicts on the benchmark's rows; what is missing is judged.

        Raises:
            UserError: not one row could be judged.
        """

        def judge(_: int, keys: list[str]) -> list[Row]:
            asked = [self.row_of[key] for key in keys]
            said = guard.judge([row["messages"] for row in asked], wanted=[self.label])
            mark = {"guard": self.candidate.identity}
            return [
                {"id": key, "row": row["id"], **mark, "verdict": asdict(verdict)}
                for key, row, verdict in zip(keys, asked, said, strict=True)
            ]

        options = {"together": not self.candidate.served, "again": _failed}
        title = f"{self.candidate.name} on {self.benchmark.name}"
        rows = self.rows.fill(self.keys, judge, size=chunk, title=title, **options)
        out = [Verdict(**row["verdict"]) for row in rows]
        if all(verdict.error is not None for verdict in out):
            raise UserError(f"not one row could be judged: {out[0].error}")
        return out


def _failed(row: Mapping[str, Any]) -> bool:
    return row["verdict"]["error"] is not None


def _judge(
    candidate: Candidate, kept: Sequence[KeptVerdicts], known: KeptRows, chunk: int
) -> tuple[dict[str, list[Verdict]], dict[str, dict], dict]:
    """`judge_all` on open files."""
    verdicts: dict[str, list[Verdict]] = {}
    problems: dict[str, dict] = {}
    guard, broken = None, None
    about = known.get(candidate.identity)
    if about is None or any(one.missing() for one in kept if one.label in about["judges"]):
        try:
            guard = candidate.load()
            thresholds = getattr(guard, "thresholds", None) or {}
            about = {"identity": candidate.identity, "judges": list(guard.judges)}
            about |= {"thresholds": thresholds, "sees": guard.sees}
            known.append(about)
        except Exception as error:  # whatever a guard can raise
            broken = _one_line(error, f"{candidate.name} does not load")
    for one in kept:
        name = one.benchmark.name
        if about is not None and one.label not in about["judges"]:
            problems[name] = NOT_SUPPORTED
        elif broken and (about is None or one.missing()):
            problems[name] = {"status": "failed", "reason": broken}
        else:
            try:
                verdicts[name] = one.verdicts(guard, chunk)
            except Exception as error:
                reason = _one_line(error, f"{candidate.name} on {name}")
                problems[name] = {"status": "failed", "reason": reason}
    return verdicts, problems, about or {}


def _one_line(error: Exception, what: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    logger.error("%s: %s", what, reason, exc_info=None if isinstance(error, UserError) else error)
    return f"{reason:.300}"
