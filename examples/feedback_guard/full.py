"""The whole experiment: process -> train -> evaluate, each a process of its own, which meet in
files alone.

    ./run_experiment.sh full                                      # the quickstart: bundled model and sample, CPU
    python full.py full --config research_config.json             # the original's values
    python full.py train --config research_config.json            # one stage; without its name, the config's `mode`

What is done is not done again: run it once more after a kill. It leaves
experiment_results_<time>.json, results.md with its picture, and manifest.json in
experiment.results_dir.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from config import FOLDER, Config, parse_command_line

from common.conversation import UserError
from common.run import manifest, run_cli, write_json

logger = logging.getLogger("feedback_guard")


def main() -> None:
    stages = ("process", "train", "evaluate", "full")
    stage = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in stages else None
    config, _ = parse_command_line(__doc__)
    flags = sys.argv[1:]
    if (stage or config.mode) != "full":
        run_stage(stage or config.mode, flags)
        return
    started, seconds = time.time(), {}
    # process.py looks at the config first, and prepares
    for stage in ("process", "train", "evaluate"):
        before = time.time()
        run_stage(stage, flags)
        seconds[stage] = round(time.time() - before, 1)
    finish(config, seconds, started)


def run_stage(stage: str, flags: list[str]) -> None:
    """Run a stage with this command's flags.

    Raises:
        UserError: it failed; it has said why.
    """
    logger.info("== %s", stage)
    if subprocess.run([sys.executable, str(FOLDER / f"{stage}.py"), *flags]).returncode:
        raise UserError(
            f"{stage}.py failed, see above; mend it and run the same command again: it goes on there"
        )


def finish(config: Config, seconds: dict[str, float], started: float) -> None:
    """One result file with the original's keys, the manifest of all stages, and the tables.

    Args:
        seconds: of this run's stages; one that went on after a kill, or had nothing to do, took
        longer in all.
    """
    folder, evaluation = Path(config.experiment.results_dir), Path(config.evaluation.results_dir)
    results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "process_stats": json.loads(
            (Path(config.dataset.store_dir) / "process_stats.json").read_text("utf-8")
        ),
        "improved_model_path": results["improved_model_path"],
        "evaluation": results["summary"],
    }
    write_json(folder / f"experiment_results_{time.strftime('%Y%m%d_%H%M%S')}.json", found)
    spent = seconds | {"total": round(time.time() - started, 1)}
    made = manifest([config.as_dict()], seconds_of_this_run=spent, verdict=results["verdict"])
    write_json(folder / "manifest.json", made)
    for name in ("results.md", "precision_recall.png") if not folder.samefile(evaluation) else ():
        shutil.copy(evaluation / name, folder)
    logger.info("Seconds: %s. Results: %s", json.dumps(seconds), folder)


if __name__ == "__main__":
    run_cli(main)
