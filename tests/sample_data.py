"""Whether the texts of data/sample are those that were checked: `python tests/sample_data.py` says
so.

The checks of the texts (marked `sample_data`) need not run again until a file there changes.
"""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data/sample"
CHECKED = ROOT / "tests/unit/sample_data.sha256"
HOW = "python -m pytest -m sample_data && python tests/sample_data.py"


def digest() -> str:
    """One SHA-256 of the names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            name = path.relative_to(FOLDER).as_posix()
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{content}  {name}\n".encode())
    return found.hexdigest()


def is_checked() -> bool:
    return CHECKED.is_file() and CHECKED.read_text(encoding="utf-8").strip() == digest()


if __name__ == "__main__":
    CHECKED.write_text(f"{digest()}\n", encoding="utf-8")
    print(f"{CHECKED}: renewed")
