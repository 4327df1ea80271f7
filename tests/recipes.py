"""Loads files of a recipe in tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
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
