"""What is judged and by whom, and the verdicts, kept as they come so that a killed run goes on."""

import gc
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path

import pandas
import torch
import yaml

from common import data, metrics
from common.conversation import UserError, Verdict, check_url, one_line
from common.data import parse_spec
from common.data.specs import Spec, specs_of_name
from common.keep import KeptRows, Row, digest, fingerprint
from common.run import expand_home
from guards import Guard, load_guard, zoo
from guards.card import has_card
from guards.identity import described, guard_identity, is_served
from guards.kept import fill_verdicts
from guards.known import ALIASES, near_names, zoo_name
from guards.suite.benchmarks import (
    Benchmark,
    benchmark_names,
    is_benchmark,
    load_benchmark,
    modified,
    paper,
    split_modifier,
    split_spec,
)
from guards.suite.own import TASKS, own_benchmarks, own_rows, own_spec
from guards.suite.predictions import PredictedGuard
from guards.suite.score import judged

logger = logging.getLogger("suite")
SERVED = ("engine", "server_url", "server_model", "server_timeout")
# kind of guard: options for all that it has not
NOT_FOR = {"generative": (), "api": (*SERVED, "trust_remote_code", "long_inputs")}
NOT_SUPPORTED = {
    "status": "not supported",
    "reason": "the guard does not judge this label",
}


@dataclass(frozen=True)
class Candidate:
    """A guard to be evaluated. Kept verdicts are taken for its `identity` alone."""

    name: str
    spec: str
    identity: str
    load: Callable[[], Guard]
    zoo: str | None = None  # its name there
    released: bool = False  # it is the zoo's model itself, not one that was trained like it
    predicted: PredictedGuard | None = None  # where its predictions alone are known
    train_data: tuple[str, ...] = ()  # specs of what its card says that it was trained on
    served: bool = False  # elsewhere, where a verdict does not depend on what else is asked


@dataclass
class Found:
    """What is known of one guard: verdicts by benchmark; of the other benchmarks, status ("failed",
    "not supported") and reason; what is kept of the guard itself, its thresholds and what it sees
    of conversations; and the tables of `score.judged`.
    """

    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    problems: dict[str, dict[str, str]] = field(default_factory=dict)
    about: Row = field(default_factory=dict)
    said: dict[str, pandas.DataFrame] = field(default_factory=dict)


# --- guards ---------------------------------------------------------------------------------------


def candidates(specs: Sequence[str], options: Row) -> list[Candidate]:
    """The guards that specs name. Whether they load is seen when it is their turn.

    Args:
        specs: name of the zoo (or of the paper's code), hub id, folder or name=folder, each with
            `:option=value,…` of its own; or name=predictions:FILE.
        options: of `load_guard`, for all of them whose kind takes them.

    Raises:
        UserError: a name that is none, a name that is given to no folder, or to a folder that does
            not say what guard it holds; a URL with a password or a key.
    """
    return [_predicted(spec) or _candidate(spec, options) for spec in specs]


def _predicted(text: str) -> Candidate | None:
    """The guard of name=predictions:FILE."""
    parts = re.fullmatch(r"([^=]+)=predictions:(.+)", text)
    if parts is None:
        return None
    name, file = parts.groups()
    file = expand_home(file)
    guard = PredictedGuard(name, file)
    return Candidate(
        name=name,
        spec=text,
        identity=digest(["predictions", fingerprint(file)]),
        load=lambda: guard,
        zoo=zoo_name(name),
        released=zoo_name(name) is not None,
        predicted=guard,
    )


def _candidate(text: str, options: Row) -> Candidate:
    spec, own = re.fullmatch(r"(.*?)(?::(\w+=.*))?", text).groups()
    given = _own_options(spec, own)
    name, spec = _name_and_model(spec)
    has_own_card = has_card(spec)
    if name and not has_own_card:
        given["model"] = spec
        spec = name
    about = described(spec)
    known_as = zoo_name(name or spec) or zoo_name(str(about.get("guard")))
    unwanted = NOT_FOR.get(str(about.get("kind")), SERVED)
    given = {key: value for key, value in options.items() if key not in unwanted} | given
    if name is None:
        name = "/".join(Path(spec).parts[-2:]) if has_own_card else known_as or spec
    return Candidate(
        name=f"{name} ({own})" if own else name,
        spec=text,
        identity=guard_identity(spec, given),
        load=lambda: load_guard(spec, **given, progress=False),
        zoo=known_as,
        released=not has_own_card and known_as is not None,
        train_data=_train_data(about.get("data") or {}),
        served=is_served(spec, given),
    )


def _train_data(said: Row) -> tuple[str, ...]:
    """The data specs that a card of ours has for what the guard was trained on."""
    names = [said.get(key) for key in ("train_data", "train")]
    names = [name for name in names if isinstance(name, str)]
    return tuple(specs_of_name(names[0])) if names else ()


def _own_options(spec: str, text: str | None) -> Row:
    """What stands after the colon of a guard: option=value,…"""
    given = {}
    for option in (text or "").split(","):
        key, equals, value = option.partition("=")
        if equals:
            given[key] = expand_home(yaml.safe_load(value))
    for key in ("server_url", "base_url"):
        if key in given:  # it stands in results.json
            check_url(given[key], f"--guards {spec}, {key}")
    return given


def _name_and_model(spec: str) -> tuple[str | None, str]:
    """The name that a guard is given (None without name=), and its folder, zoo name or hub id."""
    spec = expand_home(spec)
    if Path(spec).exists():
        return None, spec
    name, equals, folder = spec.partition("=")
    name = ALIASES.get(name, name)
    near = [] if zoo_name(name) else near_names(name)
    hint = f"; near it: {', '.join(near)}" if near else ""
    if not equals:
        if near and "/" not in name:
            raise UserError(f"--guards {spec}: no guard {name!r}{hint}")
        return None, name
    folder = expand_home(folder)
    if not Path(folder).is_dir():
        raise UserError(f"--guards {spec}: {folder} is no folder")
    if not has_card(folder) and name not in zoo():
        raise UserError(
            f"--guards {spec}: {folder} has no guard.json, and {name} is no name of the guard "
            f"zoo{hint}"
        )
    return name, folder


# --- benchmarks -----------------------------------------------------------------------------------


def read_benchmarks(
    specs: Sequence[str], task_type: str | None, max_rows: int | None
) -> tuple[list[Benchmark], dict[str, str]]:
    """The benchmarks of the asked task, and what became of those that the hub did not give. A
    modified one brings the plain one with it, from which its drop is measured.

    Raises:
        UserError: unknown name, bad local file, nothing left.
    """
    tasks = ["prompt", "response"] if task_type in (None, "both") else [task_type]
    if not specs:
        specs = [name for task in tasks for name in paper()["tasks"][task]]
    elif task_type:
        asked = [name for task in tasks for name in benchmark_names(TASKS[task])]
        specs = [s for s in specs if split_spec(s)[0] in asked or not is_benchmark(s)]
    found: dict[str, Benchmark] = {}
    unread = {}
    for spec in with_plain(specs):
        try:
            read = _benchmarks_of(spec, max_rows)
        except UserError as error:
            if "@" in spec or not is_benchmark(spec):  # the user can mend it
                raise
            unread[spec] = str(error)
            logger.error("%s", error)
            continue
        for benchmark in read:
            if task_type and benchmark.label not in [TASKS[task] for task in tasks]:
                continue
            if benchmark.name in found:
                hint = "; another name: mine=FILE" if benchmark.facts.get("own") else ""
                what = f"{benchmark.name} stands there twice{hint}"
                raise UserError(f"--benchmarks {spec}: {what}")
            found[benchmark.name] = benchmark
    if unread and not found:
        raise UserError("--benchmarks: none could be read")
    if not found:
        raise UserError(f"--task_type {task_type}: none is left")
    return list(found.values()), unread


def with_plain(specs: Sequence[str]) -> list[str]:
    """The specs, each modified one after its plain one."""
    named = [spec for spec in specs if not split_modifier(spec)[1]]
    known = [split_spec(spec) for spec in named]
    out = []
    for spec in specs:
        plain, modifier = split_modifier(spec)
        if modifier and split_spec(plain) not in known:
            known.append(split_spec(plain))
            out.append(plain)
        out.append(spec)
    return out


def _benchmarks_of(spec: str, max_rows: int | None) -> list[Benchmark]:
    """The benchmark of a name, or those of own rows: one a label."""
    plain, modifier = split_modifier(spec)
    if own_spec(plain) is None:
        return [load_benchmark(spec, max_rows=max_rows)]
    own = own_benchmarks(plain, max_rows=max_rows)
    return [modified(benchmark, modifier) for benchmark in own] if modifier else own


def _tested(specs: Sequence[str]) -> set[tuple[str, ...]]:
    """The files and splits whose rows are judged."""
    places = set()
    for spec in specs:
        own = own_spec(split_modifier(spec)[0])
        if own is not None:
            places |= _places(own)
        elif "@" in spec:
            places |= _places(parse_spec(split_spec(spec)[1]))
    return places


def _places(spec: Spec) -> set[tuple[str, ...]]:
    """Where the rows of a spec lie: its file, or each of its splits, whatever its slices."""
    path = Path(spec.name)
    name = str(path.resolve()) if path.exists() else spec.name
    splits = [""] if spec.is_file else spec.splits
    return {(name, *spec.marks, split) for split in splits}


def read_validation(
    specs: Sequence[str], benchmarks: Sequence[str], labels: set[str]
) -> dict[str, Benchmark]:
    """The rows to fit thresholds on, by label.

    Raises:
        UserError: a test split, rows that are judged, or rows of one class only.
    """
    tested = _tested(benchmarks)
    for spec in specs:
        file = split_spec(spec)[1] if is_benchmark(spec) else spec
        is_tested = file and not tested.isdisjoint(_places(parse_spec(file)))
        if not file or metrics.is_test(file) or is_tested:
            what = "is test data; a threshold is fitted on other rows"
            raise UserError(f"--validation {spec}: {what}")
    out = {}
    for label in sorted(labels) if specs else ():
        rows = []
        for spec in specs:
            rows += _validation_rows(spec, label)
        classes = {row["label"] for row in rows}
        if len(classes) == 2:
            out[label] = Benchmark(f"validation-{label}", label, rows, {})
        elif rows:
            what = f"all {len(rows)} rows with {label} have one class; a threshold needs both"
            raise UserError(f"--validation: {what}")
        else:
            logger.warning("--validation: no row has %s, so no threshold is fitted for it.", label)
    return out


def _validation_rows(spec: str, label: str) -> list[Row]:
    """The rows of a data spec that have a label, as those of a benchmark."""
    if is_benchmark(spec):
        benchmark = load_benchmark(spec)
        return benchmark.rows if benchmark.label == label else []
    return own_rows(list(data.load_conversations(spec)), label)


# --- verdicts -------------------------------------------------------------------------------------


def judge_all(
    candidate: Candidate,
    benchmarks: Sequence[Benchmark],
    folder: Path,
    chunk: int,
    overwrite: bool = False,
) -> Found:
    """One guard's verdicts on each benchmark. It is loaded once, only if rows are missing. What a
    guard raises is not raised: one that fails must not stop the others.

    Args:
        folder: where its verdicts are kept, in `<benchmark>.jsonl`, and in `guards.jsonl` what it
            judges.
        chunk: rows that are judged at a time.
        overwrite: judge anew what is kept of these benchmarks.

    Raises:
        UserError: a file of kept verdicts is broken, or another run writes it.
    """
    gc.collect()  # the guard before this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    folder = folder / re.sub(r"[^\w.=-]+", "_", candidate.name)
    found = Found()
    load = cache(candidate.load)
    broken = None
    with KeptRows(folder / "guards.jsonl", "identity") as known:
        try:
            if candidate.identity not in known:
                known.append(_facts(load(), candidate.identity))
            found.about = known[candidate.identity]
        except Exception as error:  # whatever a guard can raise
            broken = _failed(error, f"{candidate.name} does not load")
    for benchmark in benchmarks:
        name = benchmark.name
        file = folder / f"{name}.jsonl"
        if broken is not None:
            found.problems[name] = broken
            continue
        if benchmark.label not in found.about["judges"]:
            found.problems[name] = NOT_SUPPORTED
            continue
        if overwrite:
            file.unlink(missing_ok=True)
        # predictions are kept where they come from
        rows = KeptRows(file, "id") if candidate.predicted is None else nullcontext()
        with rows as kept:
            try:
                said = _verdicts(candidate, benchmark, kept, load, chunk)
                unsaid_is = benchmark.facts.get("unsaid_is")
                known = found.about.get("thresholds", {})
                found.said[name] = judged(benchmark.rows, said, benchmark.label, unsaid_is, known)
                found.verdicts[name] = said
            except Exception as error:
                found.problems[name] = _failed(error, f"{candidate.name} on {name}")
    return found


def _facts(guard: Guard, identity: str) -> Row:
    """What is kept of a guard, so that a finished one is not loaded again."""
    return {
        "identity": identity,
        "judges": list(guard.judges),
        "thresholds": guard.thresholds or {},
        "sees": guard.sees,
    }


def _verdicts(
    candidate: Candidate,
    benchmark: Benchmark,
    kept: KeptRows | None,
    load: Callable[[], Guard],
    chunk: int,
) -> list[Verdict]:
    """The verdicts on a benchmark's rows; what is missing is judged, and predictions are looked up.

    Raises:
        UserError: not one row could be judged.
    """
    if candidate.predicted is not None:
        out = candidate.predicted.judge_rows(benchmark.rows, benchmark.label)
        return _some_judged(out, "none of its ids and hashes is one of these rows")
    keys = [digest([candidate.identity, row["id"]]) for row in benchmark.rows]
    row_of = dict(zip(keys, benchmark.rows, strict=True))

    def judge(asked: list[str]) -> list[Verdict]:
        conversations = [row_of[key]["messages"] for key in asked]
        guard = load()
        if "wanted" not in signature(guard.judge).parameters:  # a judge() that somebody wrote anew
            return guard.judge(conversations)
        return guard.judge(conversations, wanted=[benchmark.label])

    said = fill_verdicts(
        kept,
        keys,
        judge,
        size=chunk,
        served=candidate.served,
        title=f"{candidate.name} on {benchmark.name}",
        beside=lambda key: {"row": row_of[key]["id"], "guard": candidate.identity},
    )
    return _some_judged([said[key] for key in keys], "--overwrite asks it anew")


def _some_judged(verdicts: list[Verdict], hint: str) -> list[Verdict]:
    """The verdicts, of which one at least must be no error."""
    if all(verdict.error is not None for verdict in verdicts):
        raise UserError(f"not one row could be judged: {verdicts[0].error} ({hint})")
    return verdicts


def _failed(error: Exception, what: str) -> dict[str, str]:
    """An error as a problem; what is no mistake of the user's is logged with its traceback."""
    reason = one_line(error, 300)
    expected = isinstance(error, UserError)
    if not expected:
        reason = f"{type(error).__name__}: {reason}"
    logger.error("%s: %s", what, reason, exc_info=None if expected else error)
    return {"status": "failed", "reason": reason}
