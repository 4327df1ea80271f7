"""Does this machine's GPU do what the recipes ask of it, and how fast?

    make check-gpu                            # at the root: at most 8 minutes on an 80 GB GPU
    cd bench && python gpu.py --quick         # at most 3
    python gpu.py --only moderation           # some steps
    python gpu.py --full --budget 1800        # with all layers of the 7B and 8B shapes
    python gpu.py --dry                       # all of it with tiny models, on a CPU

Every step is a process of its own with a time limit: one that fails, or lacks a library, is a row
with its reason, and the others go on. Models have the shapes of public ones and random weights, so
that no hub is needed; speed and memory are real, scores say nothing. Those of 7B and 8B have half of
their layers, which their rows say. The results are written after every step to
output/check-gpu/results.json and results.md. Weights and what is trained lie beside them, up to
26 GB (40 with --full). The exit code is 1 where a step failed; one that the end of the time cuts
off is left out. Without a GPU it is a dry run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_plan import (
    BUNDLED,
    ROOT,
    SAMPLE,
    Command,
    Run,
    Step,
    device_step,
    steps_of,
    weights_step,
    with_needed,
)
from gpu_results import Row, shown, write_results

BUDGET = 480  # seconds
QUICK_BUDGET = 180
DRY_BUDGET = 1200
GRACE = 5  # seconds to end in, before a process is killed
LAUNCHERS = re.compile("ChildFailedError|CalledProcessError")
SAME_LOSS = 0.02  # how far the first losses of two launches may lie apart, in bf16


# --- the command line -----------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("--quick", action="store_true", help="the first steps alone")
    add("--dry", action="store_true", help="tiny models; on a CPU it is the only way")
    add("--full", action="store_true", help="all layers of the 7B and 8B shapes")
    add("--only", nargs="+", metavar="STEP", help="some steps; --list names them")
    add("--list", action="store_true", help="name the steps, and end")
    add("--budget", type=float, help=f"seconds for all ({BUDGET}; --quick: {QUICK_BUDGET})")
    results = ROOT / "output/check-gpu"
    add("--output", type=whole_path, default=results, help="folder of the results")
    add("--scratch", type=whole_path, help="folder for weights; default: that of the results")
    about = "whose prompts are tokenized: bundled name or folder"
    add("--tokenizer", default=BUNDLED, help=about)
    add("--python", default=sys.executable, help="what starts the steps")
    return parser.parse_args(words)


def whole_path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def main() -> None:
    args = parse()
    run = Run(
        args.python,
        args.output,
        args.output,
        tiny=args.dry,
        full=args.full,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a scheduler's: nothing stays behind
    known = {step.name: step.what for step in steps_of(run)}
    if args.list:
        for name, what in known.items():
            print(f"{name}: {what}")
        return
    unknown = set(args.only or ()) - set(known)
    if unknown:
        sys.exit(f"error: --only {', '.join(sorted(unknown))}: no such step; --list names them")
    if args.only:
        args.only = with_needed(args.only, steps_of(run))
    args.output.mkdir(parents=True, exist_ok=True)
    with scratch(args) as folder:
        check = Check(args, replace(run, scratch=folder))
        check.run_all()
    print(f"\nresults: {args.output / 'results.md'}")
    statuses = {row.status for row in check.rows}
    sys.exit(bool(statuses & {"failed", "killed"}))


@contextlib.contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    """A new folder for weights and trained models, gone at the end."""
    parent = args.scratch or args.output
    parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix="scratch-", dir=parent)
    folder = Path(made)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- all steps ------------------------------------------------------------------------------------


class Check:
    """All steps, one after another, and the rows of their results."""

    def __init__(self, args: argparse.Namespace, run: Run):
        self.args = args
        self.run = run
        self.rows: list[Row] = []
        self.made: dict[str, Row] = {}  # the rows of weights, by model
        self.budget = args.budget or BUDGET
        self.started = time.monotonic()

    def run_all(self) -> None:
        """Look at the device, then do what it allows; the results are whole after every step."""
        self.add(self.with_libraries(device_step(self.run)))
        machine = self.rows[0].figures
        gpus = machine.get("gpus", 0)
        dry = self.args.dry or not gpus
        if dry and not self.args.dry:
            print("No GPU that works here: a dry run, tiny models on the CPU.")
        self.run = replace(self.run, tiny=dry, gpus=gpus)
        if not self.args.budget:
            self.budget = DRY_BUDGET if dry else self.budget
            if self.args.quick and not dry:
                self.budget = QUICK_BUDGET
        earlier = self.run.result("").parent  # nothing is compared with another run
        shutil.rmtree(earlier, ignore_errors=True)
        write_rows(self.run.folder, dry)
        plan = steps_of(self.run)[1:]
        for place, step in enumerate(plan):
            self.add(self.row_of(step))
            later = [other for other in plan[place + 1 :] if not self.left_out(other)]
            self.make_room(step, later)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.step}: {row.status} {row.reason} {shown(row.figures)}", flush=True)
        write_results(self.args.output, self.rows)

    def row_of(self, step: Step) -> Row:
        """The row of a step: it is performed where nothing speaks against it."""
        row = Row(step.name, step.what, "left out", aim=step.aim)
        row.reason = self.left_out(step) or self.lacks(step)
        return row if row.reason else self.with_libraries(step)

    def with_libraries(self, step: Step) -> Row:
        """Perform a step that lacks neither libraries nor weights."""
        row = Row(step.name, step.what, "missing", aim=step.aim)
        missing = []
        for name in step.needs:
            if find_spec(name) is None:
                missing.append(name)
        if missing:
            row.reason = f"not installed: {', '.join(missing)}"
            return row
        if step.model is not None:
            made = self.weights_of(step.model)
            if made.status != "done":
                row.status = made.status
                row.reason = f"{made.step}: {made.reason}"
                return row
        row = self.perform(step)
        self.compare(step, row)
        return row

    def weights_of(self, model: str) -> Row:
        """Make a model's weights when a step first needs them; what became of that."""
        if model not in self.made:
            making = weights_step(self.run, model, self.args.tokenizer)
            self.made[model] = self.with_libraries(making)
            half = self.run.models / f"{model}.partial"
            shutil.rmtree(half, ignore_errors=True)  # of a writer that was killed
            self.add(self.made[model])
        return self.made[model]

    def left_out(self, step: Step) -> str:
        """Why a step is not part of this run; empty where it is."""
        if self.args.only:
            return "" if step.name in self.args.only else "not asked for"
        if self.args.quick and not step.quick:
            return "not part of --quick"
        if self.run.tiny and not step.dry:
            return "not part of a dry run"
        if step.gpus > max(1, self.run.gpus):
            return f"needs {step.gpus} GPUs"
        return ""

    def lacks(self, step: Step) -> str:
        """The step whose result this one needs, where that did not come to be."""
        done = {row.step for row in self.rows if row.status == "done"}
        if step.after is None or step.after in done:
            return ""
        return f"it needs what {step.after} makes"

    def perform(self, step: Step) -> Row:
        """Run a step's processes, and read what they found."""
        row = Row(step.name, step.what, "done", aim=step.aim)
        left = self.started + self.budget - time.monotonic()
        if left < step.least:
            return self.out_of_time(row)
        limit = left if self.run.tiny else min(step.seconds, left)
        result = self.run.result(step.name)
        result.parent.mkdir(exist_ok=True)
        result.unlink(missing_ok=True)
        log = self.run.folder / "logs" / f"{step.name}.txt"
        log.parent.mkdir(exist_ok=True)
        start = time.monotonic()
        environment = environment_of(self.run, step)
        with log.open("wb") as output:
            for command in step.commands:
                rest = start + limit - time.monotonic()
                code = run_within(command, environment, rest, output)
                if code != 0:
                    row.status = "killed" if code is None else "failed"
                    break
        took = time.monotonic() - start
        row.seconds = round(took, 1)
        if row.status == "killed" and limit == left:
            self.out_of_time(row)
        elif row.status == "killed":
            row.reason = f"not ready after {limit:.0f} s; {log}"
        elif row.status == "failed":
            row.reason = last_words(log)
        take_result(result, row)
        return row

    def out_of_time(self, row: Row) -> Row:
        """The row of a step that the end of the check has cut off, or kept from beginning."""
        row.status = "left out"
        row.reason = f"the {self.budget:.0f} s are over; --only {row.step} runs it"
        return row

    def compare(self, step: Step, row: Row) -> None:
        """Set what was measured beside the device's rate, and the losses beside another step's."""
        device = self.rows[0] if self.rows else row
        rate = device.figures.get("matrix_tflops")
        speed = row.figures.get("model_tflops")
        if rate and speed:
            row.figures["mfu"] = speed / rate
        by_name = {one.step: one for one in self.rows}
        other = by_name.get(step.like)
        if other is None or {row.status, other.status} != {"done"}:
            return
        apart = losses_apart(row, other)
        if apart is None:
            return
        row.figures["losses_apart"] = apart
        if apart > SAME_LOSS:
            row.status = "failed"
            row.reason = f"the losses are not those of {step.like}"

    def make_room(self, step: Step, later: Sequence[Step]) -> None:
        """Remove weights, and what a step has trained, that no later step needs."""
        if step.model and step.model not in {other.model for other in later}:
            shutil.rmtree(self.run.models / step.model, ignore_errors=True)
        if step.name not in {other.after for other in later}:
            shutil.rmtree(self.run.output(step.name), ignore_errors=True)


def losses_apart(row: Row, other: Row) -> float | None:
    """How far the first losses of two steps lie apart; later ones drift in bf16."""
    losses = row.figures.get("losses", [])[:3]
    apart = []
    for one, another in zip(losses, other.figures.get("losses", []), strict=False):
        apart.append(abs(one - another))
    return max(apart, default=None)


# --- a process ------------------------------------------------------------------------------------


def environment_of(run: Run, step: Step) -> dict[str, str]:
    """The environment of a step: no hub, this clone's modules, and one GPU where it asks for one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if find_spec("common") is None:  # the clone is not installed
        folders = [str(ROOT)]
        if environment.get("PYTHONPATH"):  # where the user keeps other libraries
            folders.append(environment["PYTHONPATH"])
        environment["PYTHONPATH"] = os.pathsep.join(folders)
    if run.tiny and run.gpus:  # a dry run starts no launcher, which a GPU would ask for
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif run.gpus > 1 and step.gpus == 1:
        seen = environment.get("CUDA_VISIBLE_DEVICES") or "0"
        environment["CUDA_VISIBLE_DEVICES"] = seen.partition(",")[0]
    return environment


def run_within(
    command: Command,
    environment: Mapping[str, str],
    seconds: float,
    output,
) -> int | None:
    """The exit code of a process, or None where it was killed because its time was over.

    It leads a group of its own, which is ended with it: launchers and engines leave children.
    """
    process = subprocess.Popen(
        command.words,
        cwd=command.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process and its children: first asked to, then killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log: Path) -> str:
    """Why a process failed: the last line of its output that says so, or the very last. That its
    launcher has a child that failed is no reason.
    """
    last = ""
    error = ""
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        line = line.strip()
        last = line or last
        if not LAUNCHERS.search(line) and re.match(r"(error:|[\w.]*(Error|Exception)\b)", line):
            error = line
    return f"{error or last:.200} ({log})"


def take_result(path: Path, row: Row) -> None:
    """Add what a step wrote to its row."""
    if not path.is_file():
        if row.status == "done":
            row.status = "failed"
            row.reason = "it measured nothing"
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    row.figures = found["figures"]
    if found["failures"] and row.status == "done":
        row.status = "failed"
        row.reason = "; ".join(found["failures"])


# --- the rows that are trained --------------------------------------------------------------------


def write_rows(folder: Path, tiny: bool) -> None:
    """Training rows out of the sample: 16 long pairs, one of them many times, 32 long verdicts, and
    the rows of the Cross-Task Defense.
    """
    pairs = long_rows(SAMPLE / "beavertails/train.jsonl", 16, 30)
    write_lines(folder / "pairs.jsonl", pairs)
    count = 48 if tiny else 192
    write_lines(folder / "one_pair.jsonl", pairs[:1] * count)
    count = 8 if tiny else 32
    verdicts = long_rows(SAMPLE / "expguard/train.jsonl", count, 6)
    write_lines(folder / "verdicts.jsonl", verdicts)
    (path,) = (SAMPLE / "cross_task_defense/training").glob("*_stripped.json")
    refusals = json.loads(path.read_text(encoding="utf-8"))
    count = 16 if tiny else 128
    text = json.dumps(refusals[:count])
    (folder / "refusals.json").write_text(text, encoding="utf-8")


def long_rows(path: Path, count: int, answers: int) -> list[dict[str, Any]]:
    """Rows of a file with answers and labels, each with those of so many rows after it."""
    rows = []
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        row = json.loads(line)
        if row["response"] and row.get("response_label", "none"):
            rows.append(row)
    found = []
    for place in range(count):
        some = rows[place * 2 : place * 2 + answers]
        response = " ".join(row["response"] for row in some)
        found.append(some[0] | {"response": response})
    return found


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
