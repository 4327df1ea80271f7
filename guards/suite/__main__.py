"""`python -m guards.suite`: the suite's command line."""

from common.run import run_cli
from guards.suite.evaluate import main

run_cli(main)
