"""The house keeps its order: what every recipe has, what imports what, which flags and keys are
alive.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import operator
import os
import shutil
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import scripts
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    folder
    for folder in (ROOT / "examples").iterdir()
    if folder.is_dir() and folder.name[0] not in "._"
)
SCRIPTS = [folder / name for folder in EXAMPLES for name in ("train.py", "evaluate.py")]
CONFIGS = [config for folder in EXAMPLES for config in sorted((folder / "configs").glob("*.yaml"))]
each_example = pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
each_script = pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.name}"
)


def run(command: list[str], folder: Path) -> str:
    """Standard output of a command that must succeed; no byte code is left in the folder."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = scripts.run(command, folder, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def files() -> list[Path]:
    """What belongs to the repository: tracked files and new ones that are not ignored."""
    names = run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT
    ).splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by full name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def run_calls(script: Path) -> list[ast.Call]:
    """The calls of `run` in a fire script: `run(function)`, or `run(function, config, flags)`."""
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    return [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "run"]


def fire_function(script: Path) -> ast.FunctionDef | None:
    """The function that a fire script gives to `run`, where its parameters are the flags."""
    names = {call.args[0].id for call in run_calls(script) if len(call.args) in (1, 2)}
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            return node
    return None


def arguments(script: Path) -> set[str]:
    """The names of a script's arguments."""
    if function := fire_function(script):
        return {argument.arg for argument in function.args.kwonlyargs}
    return {f.name for kind in argument_types(script) for f in fields(kind) if f.init}


@cache
def argument_types(script: Path) -> dict[type, Path]:
    """The dataclasses that a script gives to `parse_args`, or to fire's `run`, each with the file
    that defines it.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    fronts = [
        n.module
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and "main" in {a.name for a in n.names}
    ]
    if fronts:  # a front: the command line is that of another file
        script = ROOT / f"{fronts[0].replace('.', '/')}.py"
        tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parsed = [call.args[0] for call in calls if getattr(call.func, "id", None) == "parse_args"]
    parsed += [call.args[2] for call in run_calls(script) if len(call.args) == 3]
    names = [node.id for types in parsed for node in ast.walk(types) if isinstance(node, ast.Name)]
    for name, loaded in list(sys.modules.items()):  # another recipe's file of the same name
        if (getattr(loaded, "__file__", None) or "").startswith(f"{ROOT}/examples/"):
            del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        f"{script.parent.name}_{script.stem}_probe", script
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(script.parent))  # as for a script that runs
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    kinds = [getattr(module, name) for name in names]
    return {kind: Path(inspect.getfile(kind)) for kind in kinds}


@pytest.mark.parametrize("name", ["common", "guards"])
def test_packages_are_of_this_repository(tmp_path, name):
    """From any folder: these are names that another clone, or another package, could have taken."""
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    found = run([sys.executable, "-c", code], tmp_path).strip()
    assert Path(found).resolve() == ROOT / name / "__init__.py", "use one environment per clone"


def test_there_is_an_example():
    assert EXAMPLES


@each_example
def test_every_example_has_its_files(folder):
    # the original's name
    paper = "research_config.json" if folder.name == "feedback_guard" else "configs/paper.yaml"
    kind = Path(paper).suffix
    for name in ("README.md", "train.py", "evaluate.py", f"configs/quickstart{kind}", paper):
        assert (folder / name).is_file(), name


@pytest.mark.parametrize("folder", [*EXAMPLES, ROOT / "bench"], ids=lambda folder: folder.name)
def test_no_script_shadows_a_package(folder):
    """A script's folder stands first on sys.path; `common` settles the one clash that is wanted."""
    known = {
        *sys.stdlib_module_names,
        *importlib.metadata.packages_distributions(),
        "common",
        "guards",
    } - {"evaluate"}
    assert not {path.stem for path in folder.glob("*.py")} & known


# --- what imports what ------------------------------------------------------------------------------------------------

# A room may import these rooms and itself. An alias hands on what has moved, for code that was
# written before.
ARROWS = {
    "common": set(),
    "guards": {"common"},
    "examples": {"common", "guards"},
    "bench": {"common", "guards", "examples"},
}
ALIASES = {"common/guards/__init__.py", "common/data/benchmarks.py", "common/quickstart.py"}
# Names that begin with "_" but are public: of named tuples, and of transformers' configurations.
PUBLIC = {"_replace", "_fields", "_attn_implementation"}


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_rooms_import_one_way():
    rooms = {*ARROWS, "tests"}
    for room, allowed in ARROWS.items():
        for path in python_files(room):
            if str(path.relative_to(ROOT)) not in ALIASES:
                found = {name.split(".")[0] for name in imported(path)} & rooms
                assert not found - allowed - {room}, path


def test_no_recipe_imports_another():
    own = {folder: {path.stem for path in folder.glob("*.py")} for folder in EXAMPLES}
    for folder in EXAMPLES:
        of_others = (
            set().union(*(own[other] for other in EXAMPLES if other != folder)) - own[folder]
        )
        for path in folder.rglob("*.py"):
            assert not {name.split(".")[0] for name in imported(path)} & of_others, path


def test_an_alias_is_an_alias():
    """It imports and hands on; nothing is defined in it."""
    for name in ALIASES:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert not [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ], name


def module_name(path: Path) -> str:
    """`common/data/__init__.py` is common.data; a recipe's own file is its stem."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("examples", "bench"):
        return f"{path.parent.name}/{path.stem}"
    return ".".join(parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Which of our modules each of our modules imports, imports within functions and for types
    included.
    """
    files = [path for room in ARROWS for path in python_files(room)]
    names = {module_name(path) for path in files}
    graph = {}
    for path in files:
        if str(path.relative_to(ROOT)) in ALIASES:
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & names
                found |= modules or {node.module or ""}
        own = {f"{path.parent.name}/{name}" for name in found}
        graph[module_name(path)] = ((found | own) & names) - {module_name(path)}
    return graph


def test_imports_run_in_no_circle():
    graph = import_graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def private_names(path: Path) -> set[str]:
    """Names that begin with one "_" and belong to another file: imported, or an attribute of
    another object.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            parent = (
                isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            )
            if not mine and not parent:
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - PUBLIC


@pytest.mark.parametrize("room", ARROWS)
def test_nobody_touches_what_is_private(room):
    for path in python_files(room):
        assert not private_names(path), path


# What hashes or moves a folder's files knows the card's name, and does not read it.
OTHER_CARD_FILES = {"common/keep.py", "common/saving.py"}


@pytest.mark.parametrize("room", ARROWS)
def test_one_file_reads_and_writes_guard_json(room):
    """Elsewhere it is named in sentences, and never as a path."""
    for path in python_files(room):
        name = str(path.relative_to(ROOT))
        if name == "guards/card.py" or name in OTHER_CARD_FILES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.rpartition("/")[2] != "guard.json" or " " in node.value, path


# --- scripts and their flags ------------------------------------------------------------------------------------------


@each_script
@pytest.mark.slow
def test_script_prints_its_help(script):
    text = run([sys.executable, script.name, "--help"], script.parent)
    assert all(f"--{name}" in text for name in arguments(script))


@each_example
@pytest.mark.slow
def test_evaluate_is_the_library(folder, tmp_path):
    """With `python -c`, as a script in a copy of the folder and, once, under torchrun."""
    probe = "import common, evaluate; print(evaluate.__file__); assert evaluate.Metric"
    library = importlib.util.find_spec("evaluate").origin
    assert Path(library).name == "__init__.py"
    assert run([sys.executable, "-c", probe], folder).split() == [library]

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("output"))
    (copy / "probe.py").write_text(probe.replace("; ", "\n"))
    assert run([sys.executable, "probe.py"], copy).split() == [library]
    if folder == EXAMPLES[0]:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=1",
        ]
        assert run([*torchrun, "probe.py"], copy).split() == [library]


def unread_keys(folder: Path) -> set[str]:
    """Keys of a recipe whose arguments are a JSON file, sections of dataclasses in config.py, that
    nothing reads.
    """
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}
    classes = [node for node in trees["config.py"].body if isinstance(node, ast.ClassDef)]
    keys = {f.target.id for kind in classes for f in kind.body if isinstance(f, ast.AnnAssign)}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    others = [
        node for name, tree in trees.items() if name != "config.py" for node in ast.walk(tree)
    ]
    named = {node.value for node in others if isinstance(node, ast.Constant)}
    return keys - read - named - {"mode"}  # the original's: here run_experiment.sh's first word


@each_script
def test_no_flag_is_dead(script):
    """Each argument that a script defines is read in it, as an attribute; a fire script's by its
    name.
    """
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    if function := fire_function(script):
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        keys = {
            node.slice.value
            for node in nodes
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
        }
        assert not arguments(script) - names - keys
        return
    if (script.parent / "config.py").is_file():
        assert not unread_keys(script.parent)
        return
    own = {kind: path for kind, path in argument_types(script).items() if path.is_relative_to(ROOT)}
    assert own
    defined = set()  # but for defaults that differ from a library's
    for kind, path in own.items():
        inherited = {
            f.name for base in kind.__mro__[1:] if is_dataclass(base) for f in fields(base)
        }
        defined |= set(kind.__annotations__) - inherited
        nodes += ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    read |= {
        key.value
        for node in nodes
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    for folder in {path.parent for path in own.values() if path.name == "arguments.py"}:
        others = [
            node
            for file in folder.glob("*.py")
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        ]
        read |= {
            node.attr
            for node in others
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    assert not defined - read


@each_config
def test_every_key_of_a_config_is_known(config):
    """`<name>_<script>.yaml` belongs to that script, every other to train.py."""
    script = config.parents[1] / f"{config.stem.rpartition('_')[2]}.py"
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert values
    assert not set(values) - arguments(script if script.is_file() else script.with_name("train.py"))


@pytest.mark.parametrize("room", ARROWS)
def test_flags_that_take_a_path_know_the_home_folder(room):
    """`type=Path` would leave a `~` as it is; `expand_home` does not."""
    for path in python_files(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                types = [key.value for key in node.keywords if key.arg == "type"]
                assert "Path" not in map(ast.unparse, types), path


def test_the_page_of_shared_flags_names_flags_that_there_are():
    table = [line for line in (ROOT / "docs/flags.md").read_text().splitlines() if line[0:1] == "|"]
    header, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    assert sorted(header[1:]) == [folder.name for folder in EXAMPLES]
    config = scripts.module("feedback_guard", "config").Config()
    for row in rows:
        for recipe, name in zip(header[1:], row[1:], strict=True):
            if recipe == "feedback_guard":
                assert not name or operator.attrgetter(name)(config) is not None
            else:
                assert name in arguments(ROOT / "examples" / recipe / "train.py")


def test_no_file_names_a_machine():
    """Nor a folder beside this one: GUARDRAIL_RECIPES_DATA names the folder of real data."""
    places = [f"/{name}/" for name in ("root", "work")]
    places += [f"shared{what}" for what in ("/data", "/cases")] + ["/".join(("..", "shared"))]
    for path in files():
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not [place for place in places if place in text], path
