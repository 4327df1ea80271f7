"""Loads files of a recipe in tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
THREADS = 2  # of torch, in what a test launches
_LOADED: dict[str, dict[str, ModuleType]] = {}


def module(recipe: str, name: str) -> ModuleType:
    """A file of a recipe as the recipe's own scripts import it; other tests do not find its names afterwards."""
    folder, own = EXAMPLES / recipe, _LOADED.setdefault(recipe, {})
    for key, loaded in list(sys.modules.items()):  # another recipe's file of the same name
        if (getattr(loaded, "__file__", None) or "").startswith(f"{EXAMPLES}/"):
            del sys.modules[key]
    sys.path.insert(0, str(folder))
    sys.modules.update(own)
    try:
        if name == "evaluate":  # a script; the name by itself is the library's
            spec = importlib.util.spec_from_file_location(f"{recipe}_evaluate", folder / "evaluate.py")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            return loaded
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for key, loaded in list(sys.modules.items()):
            if (getattr(loaded, "__file__", None) or "").startswith(f"{folder}/"):
                own[key] = sys.modules.pop(key)


def launch(
    recipe: str, *argv, launcher=(sys.executable,), threads: int = THREADS, check: bool = True
) -> subprocess.CompletedProcess:
    """A script of a recipe as a command, in its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [*map(str, launcher), *map(str, argv)]
    done = subprocess.run(command, cwd=EXAMPLES / recipe, env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done
