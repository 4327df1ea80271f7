"""Guards on safety benchmarks: every guard of the zoo, a folder or an API on every benchmark, in
one table.

    python -m guards.suite --guards wildguard llama-guard-3-8b --benchmarks xstest_prompt --output_dir output/suite

examples/expguard/evaluate.py is the same command line, and its docstring has more examples. A
killed run goes on where it was: verdicts are kept in OUTPUT_DIR/runs as they come.
"""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from common import data, metrics, report
from common.conversation import UserError, Verdict, check_url
from common.run import check_output_folder, json_lines, json_text, manifest, parse_args, write_text
from guards import zoo
from guards.suite.benchmarks import Benchmark
from guards.suite.details import details, failures
from guards.suite.judge import (
    TASKS,
    Candidate,
    candidates,
    judge_all,
    read_benchmarks,
    read_validation,
)
from guards.suite.score import (
    MARKS,
    PARSE_ERRORS,
    Judged,
    compare,
    judged,
    resolve,
    row_marks,
    row_set,
    score_cell,
)
from guards.suite.tables import METRICS, check_column, csv_text, grid, latex, markdown, published

logger = logging.getLogger("suite")
TITLE = "# Guards × benchmarks\n\nUnsafe (or a refusal) is positive. "
CHUNK = {"transformers": 64, "server": 64, "vllm": 1024}  # rows between two writes


@dataclass
class EvaluationArguments:
    output_dir: str = field(
        metadata={"help": "Folder for tables, pictures, predictions and kept verdicts."}
    )
    guards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of the guard zoo, hub ids, guard folders; name=folder is a local model of a zoo name; "
            "`:option=value,…` after any of them goes to that guard (qwen3guard-gen-8b:mode=loose)."
        },
    )
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "name or name@local_file; default: those of the ExpGuard paper."},
    )
    task_type: str | None = field(
        default=None,
        metadata={
            "help": "prompt | response | refusal | both (the first two): keeps benchmarks of that task."
        },
    )
    engine: str = field(
        default="transformers",
        metadata={"help": "transformers | vllm | server (for guards that generate)"},
    )
    server_url: str | None = field(
        default=None, metadata={"help": "URL of --engine server; its key: SERVER_API_KEY."}
    )
    server_model: str | None = field(
        default=None, metadata={"help": "The name on that server of the one guard."}
    )
    server_timeout: float = field(
        default=120.0,
        metadata={
            "help": "Seconds of silence that end a request to the server; it is tried again."
        },
    )
    long_inputs: str = field(default="windows", metadata={"help": "windows | error | truncate"})
    max_rows: int | None = field(
        default=None, metadata={"help": "So many rows of each benchmark, evenly spaced."}
    )
    validation: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data specs or benchmark@file to fit thresholds on; default: the guards' own."
        },
    )
    parse_errors: str = field(
        default="wrong",
        metadata={"help": "wrong | unsafe | excluded: how rows without a verdict count"},
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Data specs; rows whose prompt stands there are marked contaminated."},
    )
    compare: str | None = field(
        default=None, metadata={"help": "a,b: paired bootstrap of guard a minus guard b."}
    )
    add_results: list[str] = field(
        default_factory=list,
        metadata={"help": "results.json of other runs, whose guards come into the same table."},
    )
    published: str = field(
        default="run", metadata={"help": "Published numbers: run (of its guards) | all | none"}
    )
    bootstrap_rounds: int = field(
        default=1000, metadata={"help": "Draws for the intervals; 0: none."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Judge everything anew."})
    seed: int = 42


def main(default_config: Path | None = None) -> None:
    """The command line; exit code 1 says that not everything could be measured.

    Args:
        default_config: the config that is used when there is no argument at all.
    """
    (args,) = parse_args([EvaluationArguments], default_config)
    check_output_folder(args.output_dir)
    guards = candidates(args.guards, guard_options(args))
    results = evaluate(args, guards)
    measured = {cell["guard"] for cell in results["cells"] if cell["status"] == "measured"}
    failed = (
        any(cell["status"] == "failed" for cell in results["cells"]) or results["unread_benchmarks"]
    )
    if failed or {guard.name for guard in guards} - measured:
        logger.error("Not everything could be measured: see the table.")
        sys.exit(1)


def guard_options(args: EvaluationArguments) -> dict[str, Any]:
    """Options of `load_guard` for every guard whose kind takes them. Raises UserError on a URL with
    a password.
    """
    options = {"engine": args.engine, "long_inputs": args.long_inputs}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    if args.server_url:
        options |= {
            "server_url": check_url(args.server_url, "--server_url"),
            "server_model": args.server_model,
        }
    if args.engine == "server":
        options["server_timeout"] = args.server_timeout
    return options


def evaluate(args: EvaluationArguments, guards: Sequence[Candidate]) -> dict[str, Any]:
    """Judge, score, write; returns the content of results.json.

    Raises:
        UserError: a mistake in the arguments, or other results that do not fit beside these, before
        any work.
    """
    check_arguments(args, [guard.name for guard in guards])
    papers = published()
    benchmarks, unread = read_benchmarks(args.benchmarks, args.task_type, args.max_rows)
    validation = read_validation(args.validation, args.benchmarks, {b.label for b in benchmarks})
    known_prompts = {data.prompt_key(row) for part in validation.values() for row in part.rows}
    for spec in args.train_data:
        known_prompts |= {
            data.prompt_key(row) for row in data.load_conversations(spec, bad_rows="skip")
        }
    marks = {b.name: row_marks(b.rows, known_prompts) for b in benchmarks}
    results = {
        "benchmarks": {b.name: describe(b, args, marks[b.name]) for b in benchmarks},
        "unread_benchmarks": unread,
        "guards": {
            g.name: {"spec": g.spec, "zoo": g.zoo, "knows": known_to(g, benchmarks)} for g in guards
        },
        "cells": [],
        "comparison": [],
    }
    added = []
    for path in args.add_results:  # what does not fit shows now
        other = read_results(Path(path), results, args)
        results["guards"] |= other["guards"]
        results["benchmarks"] |= {
            n: b for n, b in other["benchmarks"].items() if n not in results["benchmarks"]
        }
        added += other["cells"]

    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    said: dict[tuple[str, str], Judged] = {}
    for guard in guards:
        found, problems, own, sees = judge_guard(guard, [*benchmarks, *validation.values()], args)
        results["guards"][guard.name]["sees"] = sees
        fitted = {
            label: fit_threshold(part, found.get(part.name), args)
            for label, part in validation.items()
        }
        for b in benchmarks:
            cell = {"guard": guard.name, "benchmark": b.name, "label": b.label}
            if b.name in found:
                key, threshold = (
                    (guard.name, b.name),
                    fitted.get(b.label) if args.validation else own.get(b.label),
                )
                verdicts[key], said[key] = found[b.name], judged(b.rows, found[b.name], b.label)
                cell |= {"status": "measured", "convention": convention(b, args, threshold)}
                cell |= score_cell(
                    *(said[key], b.rows, marks[b.name]),
                    parse_errors=args.parse_errors,
                    threshold=threshold,
                    seed=args.seed,
                    rounds=args.bootstrap_rounds,
                )
            results["cells"].append(cell | problems.get(b.name, {}))
        failures = [
            {"benchmark": part.name} | problems.get(part.name, {}) for part in validation.values()
        ]
        results["cells"] += [
            {"guard": guard.name} | f for f in failures if f.get("status") == "failed"
        ]
    if args.compare:
        results["comparison"] = compare_two(
            args, [guard.name for guard in guards], benchmarks, said
        )
    results["cells"] += added
    results["run"] = manifest([args])
    write(args, results, papers, benchmarks, predictions(benchmarks, marks, verdicts), said)
    return results


# --- what is evaluated ------------------------------------------------------------------------------------------------


def check_arguments(args: EvaluationArguments, names: Sequence[str]) -> None:
    """Raise UserError for what can be seen to be wrong before anything is read."""
    choices = {
        "task_type": (None, *TASKS, "both"),
        "engine": tuple(CHUNK),
        "long_inputs": ("windows", "error", "truncate"),
        "parse_errors": PARSE_ERRORS,
        "published": ("run", "all", "none"),
    }
    for name, known in choices.items():
        if (value := getattr(args, name)) not in known:
            raise UserError(f"--{name} {value}: expected one of {', '.join(filter(None, known))}")
    if args.engine == "server" and not args.server_url:
        raise UserError("--engine server: needs --server_url")
    if args.server_model and len(names) > 1:
        raise UserError(
            "--server_model: is one guard's; with several, write --guards guard:server_model=name …"
        )
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max_rows {args.max_rows}: must be at least 1")
    if args.bootstrap_rounds < 0:
        raise UserError(f"--bootstrap_rounds {args.bootstrap_rounds}: must be 0 or more")
    if not names and not args.add_results:
        raise UserError("--guards: name at least one guard")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"--guards: {', '.join(sorted(twice))} stands there twice; name one of them (name=folder)"
        )
    if args.compare and not two_of(args.compare, names):
        raise UserError(f"--compare {args.compare}: expected a,b, two of {', '.join(names)}")


def describe(
    b: Benchmark, args: EvaluationArguments, marks: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What results.json says of a benchmark; `complete`: these are the rows of which papers report
    numbers.
    """
    local = any(spec.startswith(f"{b.name}@") for spec in args.benchmarks)
    counts = {name: int(mask.sum()) for name, mask in marks.items()}
    known = {
        "label": b.label,
        "rows": len(b.rows),
        "positives": sum(row["label"] for row in b.rows),
    }
    whole = (
        args.max_rows is None
        and not b.facts.get("mismatch")
        and not (local and not b.facts.get("expected"))
    )
    recall_only = bool(b.facts.get("recall_only")) or known["rows"] == known["positives"]
    return (
        dict(b.facts)
        | known
        | counts
        | {"complete": whole, "recall_only": recall_only, "row_set": row_set(b.rows)}
    )


def known_to(guard: Candidate, benchmarks: Sequence[Benchmark]) -> list[str]:
    """Benchmarks whose own training part the released guard was trained on: no transfer is measured
    there.
    """
    trained_on = zoo()[guard.zoo].get("trained_on", ()) if guard.released else ()
    named = {
        b.name
        for b in benchmarks
        if guard.released and guard.zoo in b.facts.get("contaminated_by", ())
    }
    return [b.name for b in benchmarks if b.name in named.union(trained_on)]


def convention(
    b: Benchmark, args: EvaluationArguments, threshold: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a cell is scored: what must be equal in a column."""
    fitted = (
        f"fitted on {' '.join(args.validation)}"
        if args.validation
        else threshold and own_kind(threshold)
    )
    return {"rows": row_set(b.rows), "parse_errors": args.parse_errors, "threshold": fitted}


def own_kind(threshold: Mapping[str, Any]) -> str:
    """How a guard's own threshold was chosen, without the numbers: "max F1, n=604" and "max F1,
    n=80" are one kind.
    """
    return f"guard.json: {str(threshold.get('how', 'unknown')).partition(', n=')[0]}"


def read_results(
    path: Path, results: Mapping[str, Any], args: EvaluationArguments
) -> dict[str, Any]:
    """Another run's results.json, whose guards are to stand in this run's table.

    Args:
        results: of this run, and of the files that were read before.

    Raises:
        UserError: no such file, a guard of the same name, or cells that are scored otherwise than
        this run's will be.
    """
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        cells, own = other["cells"], results["benchmarks"]
        twice = set(other["guards"]) & set(results["guards"])
        known = {name: b["row_set"] for name, b in other["benchmarks"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--add_results {path}: no results.json of this script ({error!r:.80})"
        ) from None
    if twice:
        raise UserError(
            f"--add_results {path}: holds {', '.join(sorted(twice))} too; leave it out, or name ours otherwise"
        )
    fitted = f"fitted on {' '.join(args.validation)}" if args.validation else None
    scored = {"parse_errors": args.parse_errors, "threshold": fitted}
    for name in set(known) & set(own):
        ours = {"guard": "this run", "benchmark": name, "status": "measured"}
        ours["convention"] = scored | {"rows": own[name]["row_set"]}
        for metric in METRICS:
            if fitted or metric != "f1_at_validation":
                check_column(
                    [ours | {metric: 0.0}, *(c for c in cells if c["benchmark"] == name)], metric
                )
    return other


# --- judging and scoring ----------------------------------------------------------------------------------------------


def judge_guard(
    guard: Candidate, benchmarks: Sequence[Benchmark], args: EvaluationArguments
) -> tuple[dict[str, list[Verdict]], dict[str, dict], dict[str, dict], str | None]:
    """`judge_all`, with the guard's own fitted thresholds by label; "flagged" of guard.json is that
    of harm.

    The last is what the guard sees of a conversation (guards/base.py), None where it did not load.
    """
    folder = Path(args.output_dir) / "runs"
    found, problems, known = judge_all(
        guard, benchmarks, folder, CHUNK[args.engine], args.overwrite
    )
    fitted = known.get("thresholds", {}).items()
    # a default is fitted on nothing
    thresholds = {name: one for name, one in fitted if one.get("on")}
    flagged = {
        TASKS[task]: thresholds["flagged"]
        for task in ("prompt", "response")
        if "flagged" in thresholds
    }
    own = flagged | {label: thresholds[label] for label in TASKS.values() if label in thresholds}
    return found, problems, own, known.get("sees")


def fit_threshold(
    part: Benchmark, verdicts: Sequence[Verdict] | None, args: EvaluationArguments
) -> dict | None:
    """The threshold with the highest F1 on validation rows that have a verdict; None where there is
    none to fit.
    """
    if verdicts is None:
        return None
    said = judged(part.rows, verdicts, part.label)
    usable = ~said.failed & ~np.isnan(said.score)
    if len(set(said.truth[usable].tolist())) < 2:
        return None
    return metrics.fit_threshold(said.truth[usable], said.score[usable], ", ".join(args.validation))


def two_of(text: str, names: Iterable[str]) -> tuple[str, str] | None:
    """The two names of "a,b"; names may hold commas themselves."""
    return next(((a, b) for a, b in permutations(names, 2) if f"{a},{b}" == text), None)


def compare_two(
    args: EvaluationArguments, names: Sequence[str], benchmarks: Sequence[Benchmark], said: Mapping
) -> list[dict[str, Any]]:
    """--compare on every benchmark that both guards judged."""
    a, b = two_of(args.compare, names)
    options = (args.parse_errors, args.seed, args.bootstrap_rounds)
    return [
        {"a": a, "b": b, "benchmark": each.name}
        | compare(said[a, each.name], said[b, each.name], each.rows, *options)
        for each in benchmarks
        if (a, each.name) in said and (b, each.name) in said
    ]


# --- what is left -----------------------------------------------------------------------------------------------------


def predictions(
    benchmarks: Sequence[Benchmark], marks: Mapping, verdicts: Mapping
) -> list[dict[str, Any]]:
    """One row an item of a benchmark, with every guard's verdict."""
    return [
        {
            "benchmark": b.name,
            "id": row["id"],
            "index": row.get("index"),
            "label": b.label,
            "truth": bool(row["label"]),
        }
        | {"groups": row["groups"]}
        | {name: bool(marks[b.name][name][i]) for name in MARKS}
        | {
            "guards": {
                guard: vars(each[i]) for (guard, name), each in verdicts.items() if name == b.name
            }
        }
        for b in benchmarks
        for i, row in enumerate(b.rows)
    ]


def write(
    args: EvaluationArguments,
    results: dict,
    papers: Mapping,
    benchmarks: Sequence[Benchmark],
    rows: list[dict],
    said: Mapping[tuple[str, str], Judged],
) -> None:
    """results.json, predictions.jsonl, tables (a metric that was not measured alike has none) and
    pictures.
    """
    folder, grids, mixed = Path(args.output_dir), [], []
    for metric in METRICS:
        try:
            grids += filter(None, [grid(results, metric, papers, args.published)])
        except UserError as error:
            mixed.append(f"- {error}.\n")
            logger.warning("No table. %s", error)
    tables = [markdown(g, results["benchmarks"]) for g in grids]
    tables += ["## No table\n\n" + "".join(mixed)] if mixed else []
    rule = {
        "wrong": "as wrong, whatever the truth",
        "unsafe": "as unsafe",
        "excluded": "nowhere: they are left out",
    }
    head = f"{TITLE}Rows without a verdict count {rule[args.parse_errors]}.\n"
    text = "\n".join(part for part in [head, failures(results), *tables, details(results)] if part)
    files = {
        "results.json": json_text(results),
        "predictions.jsonl": json_lines(rows),
        "results.md": text,
    }
    files |= {
        "results.tex": "\n".join(latex(g, results["benchmarks"]) for g in grids),
        "results.csv": csv_text(grids),
    }
    for name, content in files.items():  # all of them, or none beside older ones
        write_text(folder / name, content)
    for b in benchmarks:
        curves = {}
        for (guard, name), one in said.items():
            keep, score, _ = resolve(one, args.parse_errors)
            if name == b.name and one.ranked and 0 < one.truth[keep].sum() < keep.sum():
                curves[guard] = (one.truth[keep], score[keep])
        if curves:
            path = folder / "precision-recall" / f"{b.name}.png"
            report.plot_precision_recall(curves, path, f"{b.name}: {b.label} (n={len(b.rows)})")
    print(text)
