"""Evaluate guards on safety benchmarks: every guard of the zoo, a folder or an API on every
benchmark, in one table.

    # the paper's evaluation of one model (as its safety_eval.sh): prompts and responses
    bash scripts/safety_eval.sh expguard both output/expguard-7b

    # several guards on the paper's benchmarks, with vLLM
    python evaluate.py --guards expguard=output/expguard-7b wildguard llama-guard-3-8b \
        qwen3guard-gen-8b qwen3guard-gen-8b:mode=loose --engine vllm \
        --compare expguard,wildguard --output_dir output/suite

    # one local copy of a benchmark, with a threshold fitted on rows of your own
    python evaluate.py --guards expguard=output/expguard-7b \
        --benchmarks xstest_prompt@xstest_prompts.csv --validation validation.jsonl \
        --output_dir output/xstest

A killed run goes on where it was: verdicts are kept in OUTPUT_DIR/runs as they come. Errors of a
server or of the network are asked again, all other rows are not. Exit code 1 says that a guard or a
benchmark failed, or that a guard judges none of them (the table says which), 2 a usage error. A
server's key is read from SERVER_API_KEY. Without arguments it evaluates what `torchrun train.py`
without arguments, the quickstart, has left.
"""

from pathlib import Path

from common.run import run_cli
from guards.suite.evaluate import main

if __name__ == "__main__":
    run_cli(lambda: main(Path(__file__).parent / "configs/quickstart_evaluate.yaml"))
