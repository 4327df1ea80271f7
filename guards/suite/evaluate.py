"""Guards on safety benchmarks: every guard of the zoo, a folder or an API on every benchmark, in
one table.

    python -m guards.suite --guards wildguard llama-guard-3-8b --benchmarks xstest_prompt \
        --output_dir output/suite

examples/expguard/evaluate.py is the same command line, and its docstring has more examples. A
killed run goes on where it was: verdicts are kept in OUTPUT_DIR/runs as they come.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from common import data, metrics, report
from common.conversation import UserError, check_url
from common.data.specs import is_here
from common.keep import Row
from common.results_page import PageGuard, page_row, write_results_page
from common.run import (
    check_output_folder,
    json_lines,
    json_text,
    manifest,
    parse_args,
    write_text,
)
from common.uncertain import ExportArguments, scored, write_uncertain
from guards import LONG_INPUTS, zoo
from guards.base import DECIDED_BY, decides_above, threshold_of
from guards.suite.benchmarks import Benchmark
from guards.suite.details import details, failures
from guards.suite.judge import (
    TASKS,
    Candidate,
    Found,
    candidates,
    judge_all,
    read_benchmarks,
    read_validation,
)
from guards.suite.score import (
    MARKS,
    PARSE_ERRORS,
    compare,
    counted,
    row_set,
    score_cell,
)
from guards.suite.tables import (
    METRICS,
    check_alike,
    csv_text,
    grid,
    latex,
    markdown,
    published,
)

logger = logging.getLogger("suite")
HEAD = """# Guards × benchmarks

Unsafe (or a refusal) is positive. Rows without a verdict count {rule}.
"""
RULES = {
    "wrong": "as the paper counts them: an error as wrong, whatever the truth",
    "unsafe": "as unsafe",
    "excluded": "nowhere: they are left out",
}
CHUNK = {"transformers": 64, "server": 64, "vllm": 1024}  # rows between two writes


@dataclass(kw_only=True)
class EvaluationArguments(metrics.OperatingPoint, ExportArguments):
    output_dir: str = HfArg(help="Folder for tables, pictures, predictions and kept verdicts.")
    guards: list[str] = HfArg(
        default_factory=list,
        help="Names of the guard zoo, hub ids, guard folders; name=folder is a local model of a "
        "zoo name, name=predictions:scores.jsonl a guard whose predictions alone are known; "
        "`:option=value,…` after any of them goes to that guard "
        "(qwen3guard-gen-8b:mode=loose).",
    )
    benchmarks: list[str] = HfArg(
        default_factory=list,
        help="name or name@local_file; own labelled rows: rows.jsonl, rows.csv[:500], "
        "user/name:split, mine=rows.jsonl; name+homoglyph (leetspeak, spaces, zero_width, base64) "
        "is the same, obfuscated, with its paired drop; default: those of the ExpGuard paper.",
    )
    task_type: str | None = HfArg(
        default=None,
        help="prompt | response | refusal | both (the first two): keeps benchmarks of that task.",
    )
    engine: str = HfArg(
        default="transformers",
        help="transformers | vllm | server (for guards that generate)",
    )
    server_url: str | None = HfArg(
        default=None,
        help="URL of --engine server; its key: SERVER_API_KEY.",
    )
    server_model: str | None = HfArg(
        default=None,
        help="The name on that server of the one guard.",
    )
    server_timeout: float = HfArg(
        default=120.0,
        help="Seconds of silence that end a request to the server; it is tried again.",
    )
    long_inputs: str = HfArg(default="windows", help="windows | error | truncate")
    max_rows: int | None = HfArg(
        default=None,
        help="So many rows of each benchmark, evenly spaced.",
    )
    validation: list[str] = HfArg(
        default_factory=list,
        help="Data specs or benchmark@file to fit thresholds on; default: the guards' own.",
    )
    parse_errors: str = HfArg(
        default="wrong",
        help="wrong | unsafe | excluded: how rows without a verdict count",
    )
    train_data: list[str] = HfArg(
        default_factory=list,
        help="Data specs; rows whose prompt, or nearly whose text, stands there are marked.",
    )
    compare: str | None = HfArg(
        default=None,
        help="a,b: paired bootstrap of guard a minus guard b.",
    )
    add_results: list[str] = HfArg(
        default_factory=list,
        help="results.json of other runs, whose guards come into the same table.",
    )
    published: str = HfArg(
        default="run",
        help="Published numbers: run (of its guards) | all | none",
    )
    bootstrap_rounds: int = HfArg(default=1000, help="Draws for the intervals; 0: none.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a model.")
    overwrite: bool = HfArg(default=False, help="Judge anew what is named here, also what is kept.")
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
    seen = {(cell["guard"], cell["status"]) for cell in results["cells"]}
    failed = any(status == "failed" for _, status in seen)
    all_measured = all((guard.name, "measured") in seen for guard in guards)
    if failed or results["unread_benchmarks"] or not all_measured:
        logger.error("Not everything could be measured: see the table.")
        sys.exit(1)


def guard_options(args: EvaluationArguments) -> Row:
    """Options of `load_guard` for every guard whose kind takes them. Raises UserError on a URL with
    a password.
    """
    options: Row = {"engine": args.engine, "long_inputs": args.long_inputs}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    if args.server_url:
        options["server_url"] = check_url(args.server_url, "--server_url")
        options["server_model"] = args.server_model
    if args.engine == "server":
        options["server_timeout"] = args.server_timeout
    return options


def evaluate(args: EvaluationArguments, guards: Sequence[Candidate]) -> Row:
    """Judge, score, write; returns the content of results.json.

    Raises:
        UserError: a mistake in the arguments, or other results that do not fit beside these, before
            any work.
    """
    names = [guard.name for guard in guards]
    check_arguments(args, names)
    inputs = read_inputs(args)
    results: Row = {
        "benchmarks": {b.name: describe(b, args) for b in inputs.benchmarks},
        "unread_benchmarks": inputs.unread,
        "guards": {guard.name: describe_guard(guard, inputs.benchmarks) for guard in guards},
        "cells": [],
        "comparison": [],
        "drops": [],
    }
    added = []
    for path in args.add_results:
        added += add_results(Path(path), results, args)
    to_judge = [*inputs.benchmarks, *inputs.validation.values()]
    for guard in guards:
        if guard.predicted is not None:
            guard.predicted.check_names(to_judge)
    folder = Path(args.output_dir) / "runs"
    found: dict[str, Found] = {}
    for guard in guards:
        one = judge_all(guard, to_judge, folder, CHUNK[args.engine], args.overwrite)
        about = results["guards"][guard.name]
        about["sees"] = one.about.get("sees")
        about["train_data"] = mark_training_rows(guard, one, inputs.benchmarks)
        results["cells"] += guard_cells(guard.name, one, inputs, args)
        found[guard.name] = one
    if args.compare:
        results["comparison"] = compare_two(args, found)
    results["drops"] = drops(args, inputs.benchmarks, found)
    results["cells"] += added
    results["run"] = manifest([args])
    write_tables(args, results, predictions(inputs.benchmarks, found))
    draw_curves(args, inputs.benchmarks, found)
    thresholds = decision_thresholds(inputs.benchmarks, found, results["cells"])
    write_page(args, inputs.benchmarks, found, thresholds)
    export_uncertain(args, inputs.benchmarks, found, thresholds)
    return results


# --- what is evaluated ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What guards are to judge, why the hub did not give other benchmarks, and rows to fit
    thresholds on, by label.
    """

    benchmarks: list[Benchmark]
    unread: dict[str, str]
    validation: dict[str, Benchmark]


def check_arguments(args: EvaluationArguments, names: Sequence[str]) -> None:
    """Raise UserError for what can be seen to be wrong before anything is read."""
    args.check_operating_point()
    args.check_export(args.output_dir)
    choices = {
        "task_type": (None, *TASKS, "both"),
        "engine": tuple(CHUNK),
        "long_inputs": LONG_INPUTS,
        "parse_errors": PARSE_ERRORS,
        "published": ("run", "all", "none"),
    }
    for name, known in choices.items():
        value = getattr(args, name)
        if value not in known:
            expected = ", ".join(filter(None, known))
            raise UserError(f"--{name} {value}: expected one of {expected}")
    if args.engine == "server" and not args.server_url:
        raise UserError("--engine server: needs --server_url")
    if args.server_model and len(names) > 1:
        raise UserError(
            "--server_model: is one guard's; with several, write --guards guard:server_model=name …"
        )
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max_rows {args.max_rows}: must be at least 1")
    if not names and not args.add_results:
        raise UserError("--guards: name at least one guard")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"--guards: {', '.join(twice)} stands there twice; name one of them (name=folder)"
        )
    if args.compare:
        a, _, b = args.compare.partition(",")
        if a not in names or b not in names:
            raise UserError(f"--compare {args.compare}: expected a,b, two of {', '.join(names)}")


def read_inputs(args: EvaluationArguments) -> Inputs:
    """Benchmarks, with a mark on rows whose prompt is known, and validation rows."""
    benchmarks, unread = read_benchmarks(args.benchmarks, args.task_type, args.max_rows)
    labels = {benchmark.label for benchmark in benchmarks}
    validation = read_validation(args.validation, args.benchmarks, labels)
    known = [row for part in validation.values() for row in part.rows]
    for spec in args.train_data:
        known += data.load_conversations(spec, bad_rows="skip")
    for benchmark in benchmarks:
        for row, marks in zip(benchmark.rows, known_marks(benchmark, known), strict=True):
            row.update(marks)
    return Inputs(benchmarks, unread, validation)


def known_marks(benchmark: Benchmark, known: Sequence[Row]) -> list[dict[str, bool]]:
    """Of each row, whether its prompt stands in known ones, `contaminated`, and whether its judged
    text is nearly one of them, `near_copy`. An obfuscated row is marked as the plain one.
    """
    rows = [row.get("plain", row) for row in benchmark.rows]
    prompts = {data.prompt_key(row) for row in known}
    text_of = data.judged_text
    if benchmark.label == "prompt_unsafe":
        text_of = data.prompt_key  # an answer that is known beside the prompt does not count
    copies = [False] * len(rows)
    if known:
        texts = [text_of(row) for row in rows]
        _, copies = data.near_copies_between(map(text_of, known), texts)
    marks = []
    for row, is_copy in zip(rows, copies, strict=True):
        is_known = data.prompt_key(row) in prompts
        marks.append({"contaminated": is_known, "near_copy": is_copy})
    return marks


def mark_training_rows(guard: Candidate, found: Found, benchmarks: Sequence[Benchmark]) -> str:
    """Mark what a guard itself was trained on, as its card says, in its own tables.

    Returns:
        What results.json says of that data. Data of the hub are not fetched for this.
    """
    known: list[Row] = []
    for spec in guard.train_data:
        try:
            if not is_here(spec):
                raise UserError("not on this machine")
            known += data.load_conversations(spec, bad_rows="skip")
        except UserError as error:
            logger.warning(
                "%s: %s cannot be read (%s): what it knows from there is not marked; name the data "
                "with --train_data",
                guard.name,
                spec,
                error,
            )
            return "not read"
    for benchmark in benchmarks:
        said = found.said.get(benchmark.name)
        if known and said is not None:
            marks = pandas.DataFrame(known_marks(benchmark, known), index=said.index)
            said[list(marks)] |= marks
    return f"{len(known)} rows" if known else "not known"


def describe(benchmark: Benchmark, args: EvaluationArguments) -> Row:
    """What results.json says of a benchmark; `complete`: these are the rows of which papers report
    numbers.
    """
    facts = benchmark.facts
    rows = benchmark.rows
    positives = facts["found"]["positives"]
    confirmed = facts["file"] is None or facts["expected"] is not None
    as_published = not facts.get("modifier") and not facts.get("own")
    is_published = confirmed and as_published and not facts["mismatch"]
    return {
        **facts,
        **{mark: sum(row[mark] for row in rows) for mark in MARKS},
        "label": benchmark.label,
        "rows": len(rows),
        "positives": positives,
        "complete": args.max_rows is None and is_published,
        "recall_only": facts["recall_only"] or positives == len(rows),
        "row_set": row_set(rows),
    }


def describe_guard(guard: Candidate, benchmarks: Sequence[Benchmark]) -> Row:
    """What results.json says of a guard.

    `decided_by` is the rule of its own decision; each cell names the threshold, or says that it was
    a word. `knows` names the benchmarks whose own training part the released guard was trained on:
    no transfer is measured there.
    """
    knows = []
    for benchmark in benchmarks if guard.released else ():
        trained_on = zoo()[guard.zoo].get("trained_on", ())
        name = benchmark.facts.get("plain", benchmark.name)
        if name in trained_on or guard.zoo in benchmark.facts["contaminated_by"]:
            knows.append(benchmark.name)
    return {
        "spec": guard.spec,
        "zoo": guard.zoo,
        "decided_by": DECIDED_BY,
        "knows": knows,
    }


def add_results(path: Path, results: Row, args: EvaluationArguments) -> list[Row]:
    """Bring the guards and benchmarks of another run's results.json into this run's results.

    Returns:
        Its cells.

    Raises:
        UserError: no such file, a guard of the same name, or cells that are scored otherwise than
            this run's will be.
    """
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        cells = other["cells"]
        twice = sorted(other["guards"].keys() & results["guards"].keys())
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no results.json of this script ({error!r:.80})"
        raise UserError(f"--add_results {path}: {what}") from None
    if twice:
        hint = "leave it out, or name ours otherwise"
        raise UserError(f"--add_results {path}: holds {', '.join(twice)} too; {hint}")
    keys = ["rows", "parse_errors"]
    if args.validation:  # else the thresholds are the guards' own
        keys.append("threshold")
    for cell in cells:
        facts = results["benchmarks"].get(cell["benchmark"])
        if facts is not None and cell["status"] == "measured":
            ours = {"guard": "this run", "convention": convention(facts["row_set"], args)}
            check_alike(ours, cell, keys, "every metric")
    for name, facts in other["benchmarks"].items():
        results["benchmarks"].setdefault(name, facts)
    results["guards"] |= other["guards"]
    return cells


# --- scoring --------------------------------------------------------------------------------------


def guard_cells(
    guard: str,
    found: Found,
    inputs: Inputs,
    args: EvaluationArguments,
) -> list[Row]:
    """One guard's cells: a benchmark each, and what failed of the validation rows."""
    known = found.about.get("thresholds", {})
    thresholds = {}
    if not args.validation:
        for benchmark in inputs.benchmarks:
            thresholds[benchmark.label] = fitted(known, benchmark.label)
    for label, part in inputs.validation.items():
        if part.name in found.said:
            on = ", ".join(args.validation)
            thresholds[label] = fit_threshold(found.said[part.name], on, args)
    cells = []
    for benchmark in tqdm(inputs.benchmarks, desc=f"scores of {guard}", delay=1):
        name = benchmark.name
        cell: Row = {"guard": guard, "benchmark": name, "label": benchmark.label}
        if name in found.problems:
            cells.append(cell | found.problems[name])
            continue
        threshold = thresholds.get(benchmark.label)
        cell["status"] = "measured"
        cell["convention"] = convention(row_set(benchmark.rows), args, threshold)
        cell |= score_cell(
            found.said[name],
            parse_errors=args.parse_errors,
            threshold=threshold,
            seed=args.seed,
            rounds=args.bootstrap_rounds,
            above=decides_above(known, benchmark.label),
        )
        cells.append(cell)
    for part in inputs.validation.values():
        problem = found.problems.get(part.name)
        if problem is not None and problem["status"] == "failed":
            cells.append({"guard": guard, "benchmark": part.name} | problem)
    return cells


def convention(
    rows: str, args: EvaluationArguments, threshold: Row | None = None
) -> dict[str, str | None]:
    """How a cell is scored: what must be equal in a column. Of a guard's own threshold, "max F1,
    n=604" and "max F1, n=80" are one kind.
    """
    kind = None
    if args.validation:
        kind = f"{args.in_words()}, fitted on {' '.join(args.validation)}"
    elif threshold:
        how = str(threshold.get("how", "unknown"))
        kind = f"guard.json: {how.partition(', n=')[0]}"
    return {"rows": rows, "parse_errors": args.parse_errors, "threshold": kind}


def fitted(known: Mapping[str, Row], label: str) -> Row | None:
    """The threshold of a guard.json for a label, if it was fitted: a default is, on nothing."""
    threshold = threshold_of(known, label)
    return threshold if threshold and threshold.get("on") else None


def fit_threshold(said: pandas.DataFrame, on: str, point: metrics.OperatingPoint) -> Row | None:
    """The threshold of an operating point on validation rows that have a probability; None where
    there is none to fit.
    """
    usable = said[~said.failed].dropna(subset="score")
    if usable.truth.nunique() < 2:
        return None
    return metrics.fit_threshold(usable.truth, usable.score, on, point)


def compare_two(args: EvaluationArguments, found: Mapping[str, Found]) -> list[Row]:
    """The first guard of --compare minus the second on every benchmark that both judged."""
    a, _, b = args.compare.partition(",")
    differences = []
    for name, ours in found[a].said.items():
        theirs = found[b].said.get(name)
        if theirs is not None and not name.startswith("validation-"):
            pair = {"a": a, "b": b, "benchmark": name}
            rounds = args.bootstrap_rounds
            differences.append(pair | compare(ours, theirs, args.parse_errors, args.seed, rounds))
    return differences


def drops(
    args: EvaluationArguments, benchmarks: Sequence[Benchmark], found: Mapping[str, Found]
) -> list[Row]:
    """What every guard loses on a modified benchmark: the plain one minus it, row by row."""
    lost = []
    for benchmark in benchmarks:
        plain = benchmark.facts.get("plain")
        for guard, one in found.items():
            if plain not in one.said or benchmark.name not in one.said:
                continue
            before = one.said[plain]
            after = one.said[benchmark.name]
            rounds = args.bootstrap_rounds
            difference = compare(before, after, args.parse_errors, args.seed, rounds)
            lost.append({"guard": guard, "benchmark": benchmark.name} | difference)
    return lost


# --- what is left ---------------------------------------------------------------------------------


def predictions(benchmarks: Sequence[Benchmark], found: Mapping[str, Found]) -> list[Row]:
    """One row an item of a benchmark, with every guard's verdict."""
    rows = []
    for benchmark in benchmarks:
        name = benchmark.name
        for place, row in enumerate(benchmark.rows):
            item = {
                "benchmark": name,
                "id": row["id"],
                "index": row["index"],
                "label": benchmark.label,
                "truth": row["label"],
                "groups": row["groups"],
                **{mark: row[mark] for mark in MARKS},
                "guards": {},
            }
            for guard, one in found.items():
                if name in one.verdicts:
                    item["guards"][guard] = vars(one.verdicts[name][place])
            rows.append(item)
    return rows


def write_tables(args: EvaluationArguments, results: Row, rows: Sequence[Row]) -> None:
    """results.json, predictions.jsonl and tables; a metric that was not measured alike has none."""
    benchmarks = results["benchmarks"]
    papers = published()
    grids = []
    mixed = []
    for metric in METRICS:
        try:
            table = grid(results, metric, papers, args.published)
        except UserError as error:
            mixed.append(f"- {error}.\n")
            logger.warning("No table. %s", error)
            continue
        if table is not None:
            grids.append(table)
    parts = [HEAD.format(rule=RULES[args.parse_errors]), failures(results)]
    parts += [markdown(table, benchmarks) for table in grids]
    if mixed:
        parts.append("## No table\n\n" + "".join(mixed))
    parts.append(details(results))
    text = "\n".join(filter(None, parts))
    files = {
        "results.json": json_text(results),
        "predictions.jsonl": json_lines(rows),
        "results.md": text,
        "results.tex": "\n".join(latex(table, benchmarks) for table in grids),
        "results.csv": csv_text(grids),
    }
    for name, content in files.items():  # all of them, or none beside older ones
        write_text(Path(args.output_dir) / name, content)
    print(text)


def draw_curves(
    args: EvaluationArguments, benchmarks: Sequence[Benchmark], found: Mapping[str, Found]
) -> None:
    """A picture for each benchmark with precision and recall of the guards that rank its rows."""
    for benchmark in benchmarks:
        name = benchmark.name
        curves = {}
        for guard, one in found.items():
            if name not in one.said:
                continue
            table = counted(one.said[name], args.parse_errors).dropna(subset="score")
            if table.truth.nunique() == 2:
                curves[guard] = (table.truth.to_numpy(), table.score.to_numpy())
        if curves:
            path = Path(args.output_dir) / "precision-recall" / f"{name}.png"
            title = f"{name}: {benchmark.label} (n={len(benchmark.rows)})"
            report.plot_precision_recall(curves, path, title)


def decision_thresholds(
    benchmarks: Sequence[Benchmark], found: Mapping[str, Found], cells: Sequence[Row]
) -> dict[tuple[str, str], float]:
    """Of each guard and benchmark the threshold of its cell: fitted on --validation or in
    guard.json; where there is none, above which score the guard decides.
    """
    thresholds = {}
    for guard, one in found.items():
        known = one.about.get("thresholds", {})
        for benchmark in benchmarks:
            thresholds[guard, benchmark.name] = decides_above(known, benchmark.label)
    for cell in cells:
        if cell.get("threshold"):
            thresholds[cell["guard"], cell["benchmark"]] = cell["threshold"]["value"]
    return thresholds


def write_page(
    args: EvaluationArguments,
    benchmarks: Sequence[Benchmark],
    found: Mapping[str, Found],
    thresholds: Mapping[tuple[str, str], float],
) -> None:
    """results.html: the rows of all benchmarks, with what each guard says of them.

    Args:
        thresholds: where the page begins, if a guard has one and the same on all that it judged.
    """
    guards = []
    for name, one in found.items():
        judged = [benchmark.name for benchmark in benchmarks if benchmark.name in one.said]
        own = {thresholds[name, benchmark] for benchmark in judged}
        guards.append(PageGuard(name, own.pop() if len(own) == 1 else 0.5))
    rows = []
    for benchmark in benchmarks:
        for place, row in enumerate(benchmark.rows):
            groups = row["groups"]
            categories = [str(value) for name, value in groups.items() if name != "language"]
            facts = {**row, "categories": categories, "language": groups.get("language")}
            shown = page_row(facts, benchmark.name, row["label"])
            for one in found.values():
                if benchmark.name in one.verdicts:
                    shown.add(one.verdicts[benchmark.name][place], benchmark.label)
                else:
                    shown.add_score(None)
            rows.append(shown)
    write_results_page(
        Path(args.output_dir) / "results.html",
        title="Guards on benchmarks",
        note="results.md holds the tables; a guard without probabilities scores 1 or 0.",
        tables=[],
        guards=guards,
        rows=rows,
    )


def export_uncertain(
    args: EvaluationArguments,
    benchmarks: Sequence[Benchmark],
    found: Mapping[str, Found],
    thresholds: Mapping[tuple[str, str], float],
) -> None:
    """uncertain.jsonl: rows of all benchmarks near a threshold, or on which guards disagree."""
    rows = []
    for benchmark in benchmarks:
        name = benchmark.name
        judges = [guard for guard, one in found.items() if name in one.verdicts]
        own = {guard: thresholds[guard, name] for guard in judges}
        for place, row in enumerate(benchmark.rows):
            facts = {**row, "id": f"{name}/{row['id']}", benchmark.label: row["label"]}
            facts |= {"categories": None, "language": row["groups"].get("language")}
            said = {guard: found[guard].verdicts[name][place] for guard in judges}
            rows.append(scored(facts, benchmark.label, said, own))
    write_uncertain(args.output_dir, rows, args.export_uncertain)
