"""Guards on safety benchmarks: every guard of the zoo, a folder or an API on every benchmark, in
one table.

    python -m guards.suite --guards wildguard llama-guard-3-8b --benchmarks xstest_prompt \
        --output_dir output/suite

examples/expguard/evaluate.py is the same command line, and its docstring has more examples. A
killed run goes on where it was: verdicts are kept in OUTPUT_DIR/runs as they come.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from common import data, metrics, report
from common.conversation import UserError, Verdict, check_option, check_url, one_line
from common.data.specs import is_here
from common.keep import Row
from common.results_page import page_row, write_results_page
from common.run import check_output_folder, manifest, parse_args
from common.uncertain import ExportArguments, scored, write_uncertain
from guards import LONG_INPUTS, zoo
from guards.base import DECIDED_BY, decides_above, threshold_of
from guards.known import zoo_name
from guards.suite.benchmarks import Benchmark
from guards.suite.details import details, failures
from guards.suite.judge import (
    Candidate,
    Found,
    candidates,
    judge_all,
    read_benchmarks,
    read_validation,
)
from guards.suite.own import TASKS
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
    run = read_inputs(args)
    results: Row = {
        "benchmarks": {b.name: describe(b, args) for b in run.benchmarks},
        "unread_benchmarks": run.unread,
        "guards": {guard.name: describe_guard(guard, run.benchmarks) for guard in guards},
        "cells": [],
        "comparison": [],
        "drops": [],
    }
    added = []
    for path in args.add_results:
        added += add_results(Path(path), results, args)
    to_judge = [*run.benchmarks, *run.validation.values()]
    for guard in guards:
        if guard.predicted is not None:
            guard.predicted.check_names(to_judge)
    folder = Path(args.output_dir) / "runs"
    for guard in guards:
        one = judge_all(guard, to_judge, folder, CHUNK[args.engine], args.overwrite)
        about = results["guards"][guard.name]
        about["sees"] = one.about.get("sees")
        about["train_data"] = mark_training_rows(guard, one, run.benchmarks)
        results["cells"] += guard_cells(guard.name, one, run)
        run.found[guard.name] = one
    if args.compare:
        results["comparison"] = compare_two(run)
    results["drops"] = drops(run)
    results["cells"] += added
    results["run"] = manifest([args])
    write_tables(args, results, predictions(run))
    draw_curves(run)
    thresholds = decision_thresholds(run, results["cells"])
    write_page(run, thresholds)
    export_uncertain(run, thresholds)
    return results


# --- what is evaluated ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What guards are to judge, why the hub did not give other benchmarks, rows to fit thresholds
    on, by label, and what is found of each guard.
    """

    args: EvaluationArguments
    benchmarks: list[Benchmark]
    unread: dict[str, str]
    validation: dict[str, Benchmark]
    found: dict[str, Found] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[Benchmark, Row, dict[str, Verdict]]]:
        """Each row of each benchmark, with the verdicts of the guards that judged it."""
        for benchmark in self.benchmarks:
            for place, row in enumerate(benchmark.rows):
                said = {}
                for guard, one in self.found.items():
                    if benchmark.name in one.verdicts:
                        said[guard] = one.verdicts[benchmark.name][place]
                yield benchmark, row, said

    def compared(self, a: pandas.DataFrame, b: pandas.DataFrame) -> Row:
        """What was said in a minus what was said in b, on the same rows."""
        args = self.args
        return compare(a, b, args.parse_errors, args.seed, args.bootstrap_rounds)


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
        check_option(f"--{name}", getattr(args, name), known)
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
        sides = [one if one in names else zoo_name(one) or one for one in args.compare.split(",")]
        args.compare = ",".join(sides)
        a, _, b = args.compare.partition(",")
        if a not in names or b not in names:
            raise UserError(f"--compare {args.compare}: expected a,b, two of {', '.join(names)}")


def read_inputs(args: EvaluationArguments) -> Run:
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
    return Run(args, benchmarks, unread, validation)


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
        other = data.read_json(path)
        cells = other["cells"]
        twice = sorted(other["guards"].keys() & results["guards"].keys())
    except (UserError, KeyError, TypeError) as error:
        what = f"no results.json of this script ({one_line(error, 300)})"
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


def guard_cells(guard: str, found: Found, run: Run) -> list[Row]:
    """One guard's cells: a benchmark each, and what failed of the validation rows."""
    args = run.args
    known = found.about.get("thresholds", {})
    thresholds = {}
    if not args.validation:
        for benchmark in run.benchmarks:
            thresholds[benchmark.label] = fitted(known, benchmark.label)
    for label, part in run.validation.items():
        if part.name in found.said:
            on = ", ".join(args.validation)
            thresholds[label] = fit_threshold(found.said[part.name], on, args)
    cells = []
    for benchmark in tqdm(run.benchmarks, desc=f"scores of {guard}", delay=1):
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
    for part in run.validation.values():
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


def compare_two(run: Run) -> list[Row]:
    """The first guard of --compare minus the second on every benchmark that both judged."""
    a, _, b = run.args.compare.partition(",")
    ours = run.found[a].said
    theirs = run.found[b].said
    differences = []
    for benchmark in run.benchmarks:
        name = benchmark.name
        if name in ours and name in theirs:
            pair = {"a": a, "b": b, "benchmark": name}
            differences.append(pair | run.compared(ours[name], theirs[name]))
    return differences


def drops(run: Run) -> list[Row]:
    """What every guard loses on a modified benchmark: the plain one minus it, row by row."""
    lost = []
    for benchmark in run.benchmarks:
        name = benchmark.name
        plain = benchmark.facts.get("plain")
        for guard, one in run.found.items():
            if plain in one.said and name in one.said:
                difference = run.compared(one.said[plain], one.said[name])
                lost.append({"guard": guard, "benchmark": name} | difference)
    return lost


# --- what is left ---------------------------------------------------------------------------------


def predictions(run: Run) -> list[Row]:
    """One row an item of a benchmark, with every guard's verdict."""
    rows = []
    for benchmark, row, said in run.items():
        item = {
            "benchmark": benchmark.name,
            "id": row["id"],
            "index": row["index"],
            "label": benchmark.label,
            "truth": row["label"],
            "groups": row["groups"],
            **{mark: row[mark] for mark in MARKS},
            "guards": {guard: vars(verdict) for guard, verdict in said.items()},
        }
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
    more = {
        "results.tex": "\n".join(latex(table, benchmarks) for table in grids),
        "results.csv": csv_text(grids),
    }
    report.write_results(args.output_dir, results, text, rows, more)
    print(text)


def draw_curves(run: Run) -> None:
    """A picture for each benchmark with precision and recall of the guards that rank its rows."""
    for benchmark in run.benchmarks:
        name = benchmark.name
        curves = {}
        for guard, one in run.found.items():
            if name not in one.said:
                continue
            table = counted(one.said[name], run.args.parse_errors).dropna(subset="score")
            if table.truth.nunique() == 2:
                curves[guard] = (table.truth.to_numpy(), table.score.to_numpy())
        if curves:
            path = Path(run.args.output_dir) / "precision-recall" / f"{name}.png"
            title = f"{name}: {benchmark.label} (n={len(benchmark.rows)})"
            report.plot_precision_recall(curves, path, title)


def decision_thresholds(run: Run, cells: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Of each guard and benchmark the threshold of its cell: fitted on --validation or in
    guard.json; where there is none, above which score the guard decides.
    """
    thresholds = {}
    for guard, one in run.found.items():
        known = one.about.get("thresholds", {})
        for benchmark in run.benchmarks:
            thresholds[guard, benchmark.name] = decides_above(known, benchmark.label)
    for cell in cells:
        if cell.get("threshold"):
            thresholds[cell["guard"], cell["benchmark"]] = cell["threshold"]["value"]
    return thresholds


def write_page(run: Run, thresholds: Mapping[tuple[str, str], float]) -> None:
    """results.html: the rows of all benchmarks, with what each guard says of them.

    Args:
        thresholds: where the page begins, if a guard has one and the same on all that it judged.
    """
    guards = {}
    for name, one in run.found.items():
        judged = [benchmark.name for benchmark in run.benchmarks if benchmark.name in one.said]
        own = {thresholds[name, benchmark] for benchmark in judged}
        guards[name] = own.pop() if len(own) == 1 else 0.5
    rows = []
    for benchmark, row, said in run.items():
        groups = row["groups"]
        categories = [str(value) for name, value in groups.items() if name != "language"]
        facts = {**row, "categories": categories, "language": groups.get("language")}
        shown = page_row(facts, benchmark.name, row["label"])
        for guard in guards:
            shown.add(said.get(guard), benchmark.label)
        rows.append(shown)
    write_results_page(
        Path(run.args.output_dir) / "results.html",
        title="Guards on benchmarks",
        note="results.md holds the tables; a guard without probabilities scores 1 or 0.",
        tables=[],
        guards=guards,
        rows=rows,
    )


def export_uncertain(run: Run, thresholds: Mapping[tuple[str, str], float]) -> None:
    """uncertain.jsonl: rows of all benchmarks near a threshold, or on which guards disagree."""
    rows = []
    for benchmark, row, said in run.items():
        own = {guard: thresholds[guard, benchmark.name] for guard in said}
        facts = {**row, "id": f"{benchmark.name}/{row['id']}", benchmark.label: row["label"]}
        facts |= {"categories": None, "language": row["groups"].get("language")}
        rows.append(scored(facts, benchmark.label, said, own))
    write_uncertain(run.args.output_dir, rows, run.args.export_uncertain)
