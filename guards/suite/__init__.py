"""The suite that compares guards: benchmarks, judging, scores, tables. `python -m guards.suite
--help`.
"""
