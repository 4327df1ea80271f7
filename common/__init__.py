"""What two or more recipes need: data, templates, guards, metrics, reports, run-time choices.
Nothing else.

Importing this package also settles one name clash. Every recipe has an `evaluate.py`, and a
script's own folder comes first on `sys.path`, so `import evaluate` (by a recipe, or by any library
that it uses) would find that script instead of the Hugging Face library. The finder below skips it;
running `python evaluate.py` is not affected.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path


class _EvaluateLibraryFinder(importlib.abc.MetaPathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "evaluate":
            return None
        entries = [entry for entry in sys.path if not Path(entry or ".", "evaluate.py").is_file()]
        return importlib.machinery.PathFinder.find_spec(name, entries)


sys.meta_path.insert(0, _EvaluateLibraryFinder())
