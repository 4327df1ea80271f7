"""The house keeps its order: what every recipe has, what imports what, which flags are alive."""

import ast
import dataclasses
import graphlib
import importlib.metadata
import importlib.util
import operator
import os
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import scripts
import yaml
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/README.md"))
SCRIPTS = [folder / name for folder in EXAMPLES for name in ("train.py", "evaluate.py")]
# A room may import these rooms and itself. An alias hands on what has moved, for code that was
# written before.
ARROWS = {
    "common": set(),
    "guards": {"common"},
    "examples": {"common", "guards"},
    "bench": {"common", "guards", "examples"},
}
ALIASES = {
    ROOT / "common/guards/__init__.py",
    ROOT / "common/data/benchmarks.py",
    ROOT / "common/quickstart.py",
}
ROOMS = (".", "bench", "data/sample", "docs", "docs/reproduction", "examples/*")
PAGES = sorted(page for room in ROOMS for page in ROOT.glob(f"{room}/*.md"))
# Names that begin with "_" but are public: of named tuples, and of transformers' configurations.
PUBLIC = {"_replace", "_fields", "_attn_implementation"}
# What hashes or moves a folder's files knows the card's name, and does not read it.
CARD_FILES = {ROOT / "guards/card.py", ROOT / "common/keep.py", ROOT / "common/saving.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_example = pytest.mark.parametrize("folder", EXAMPLES, ids=name_of)
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
each_config = pytest.mark.parametrize(
    "config", sorted(ROOT.glob("examples/*/configs/*.yaml")), ids=name_of
)


def run(command: list[str], folder: Path) -> str:
    """Standard output of a command that must succeed; no byte code is left in the folder."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = scripts.run(command, folder, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def module_name(path: Path) -> str:
    """`common/data/__init__.py` is common.data; `examples/x/train.py` is examples.x.train."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for room in ARROWS for path in (ROOT / room).rglob("*.py")}


each_file = pytest.mark.parametrize("path", sorted(MODULES.values()), ids=name_of)


@cache
def imported(path: Path) -> set[str]:
    """The modules that a file imports, by full name."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found


@cache
def flags(script: Path) -> set[str]:
    """The flags that a script's help names."""
    return set(re.findall(r"--(\w+)", run([sys.executable, script.name, "--help"], script.parent)))


# --- the files of a recipe ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["common", "guards"])
def test_packages_are_of_this_repository(tmp_path, name):
    """From any folder: these are names that another clone, or another package, could have taken."""
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    found = Path(run([sys.executable, "-c", code], tmp_path).strip())
    assert found == ROOT / name / "__init__.py", "use one environment per clone"


@each_example
def test_every_example_has_its_files(folder):
    names = ["train.py", "evaluate.py"]
    if folder.name == "feedback_guard":
        names += ["configs/quickstart.json", "research_config.json"]
    else:
        names += ["configs/quickstart.yaml", "configs/paper.yaml"]
    for name in names:
        assert (folder / name).is_file(), name


@pytest.mark.parametrize("folder", [*EXAMPLES, ROOT / "bench"], ids=name_of)
def test_no_script_shadows_a_package(folder):
    """A script's folder stands first on sys.path; `common` settles the one clash that is wanted."""
    known = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    known |= {"common", "guards"}
    known -= {"evaluate"}
    assert not {path.stem for path in folder.glob("*.py")} & known


@each_example
@pytest.mark.slow
def test_evaluate_is_the_library(folder):
    probe = "import common, evaluate; print(evaluate.__file__); assert evaluate.Metric"
    library = importlib.util.find_spec("evaluate").origin
    assert run([sys.executable, "-c", probe], folder).split() == [library]


# --- what imports what ----------------------------------------------------------------------------


@each_file
def test_rooms_import_one_way(path):
    if path in ALIASES:
        return
    room = path.relative_to(ROOT).parts[0]
    rooms = {name.split(".")[0] for name in imported(path)} & {*ARROWS, "tests"}
    assert rooms <= ARROWS[room] | {room}


@each_example
def test_no_recipe_imports_another(folder):
    own = {path.stem for path in folder.glob("*.py")}
    everyones = {path.stem for path in ROOT.glob("examples/*/*.py")}
    for path in folder.glob("*.py"):
        assert not imported(path) & (everyones - own), path


def test_an_alias_is_an_alias():
    """It imports and hands on; nothing is defined in it."""
    for path in ALIASES:
        for node in nodes(path):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), path


def test_imports_run_in_no_circle():
    """Imports within functions and for types included."""
    graph = {}
    for name, path in MODULES.items():
        if path not in ALIASES:
            folder = name.rpartition(".")[0]
            besides = {f"{folder}.{other}" for other in imported(path)}
            graph[name] = (imported(path) | besides) & set(MODULES) - {name}
    graphlib.TopologicalSorter(graph).prepare()


@each_file
def test_nobody_touches_what_is_private(path):
    """A name that begins with one "_" is imported by nobody, and touched on no other object."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) in ("self", "cls", "super()")
            names |= set() if own else {node.attr}
    assert not {name for name in names if re.match("_[^_]", name)} - PUBLIC


@each_file
def test_one_file_reads_and_writes_guard_json(path):
    """Elsewhere it is named in sentences, and never as a path."""
    if path in CARD_FILES:
        return
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"(\S*/)?guard\.json", node.value)


# --- scripts and their flags ----------------------------------------------------------------------


@each_script
@pytest.mark.slow
def test_script_prints_its_help(script):
    assert flags(script)


# What the Trainer reads, and the original's: here the first word of run_experiment.sh.
OTHERS_FLAGS = {field.name for field in dataclasses.fields(TrainingArguments)} | {"mode"}


def defined(path: Path) -> set[str]:
    """Fields of dataclasses, and the parameters of functions that fire turns into flags."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.ClassDef):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            names |= {field.target.id for field in fields}
        elif isinstance(node, ast.FunctionDef) and path in SCRIPTS:
            names |= {argument.arg for argument in node.args.kwonlyargs}
    return names


def read(path: Path) -> set[str]:
    """What a file reads: variables, attributes and keys."""
    names = set()
    for node in nodes(path):
        loaded = isinstance(getattr(node, "ctx", None), ast.Load)
        if isinstance(node, ast.Name) and loaded:
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and loaded:
            names.add(node.attr)
        elif isinstance(node, ast.Constant):
            names.add(node.value)
    return names


@pytest.mark.parametrize("folder", [*EXAMPLES, ROOT / "guards/suite"], ids=name_of)
def test_no_flag_is_dead(folder):
    """What a recipe defines is read in it."""
    paths = list(folder.glob("*.py"))
    names = set().union(*map(defined, paths))
    assert names
    assert not names - set().union(*map(read, paths)) - OTHERS_FLAGS


@each_config
def test_every_key_of_a_config_is_known(config):
    """`<name>_evaluate.yaml` belongs to evaluate.py, every other to train.py."""
    script = "evaluate.py" if config.stem.endswith("_evaluate") else "train.py"
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert values
    assert not set(values) - flags(config.parents[1] / script)


@each_file
def test_flags_that_take_a_path_know_the_home_folder(path):
    """`type=Path` would leave a `~` as it is; `expand_home` does not."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            assert "type=Path" not in map(ast.unparse, node.keywords)


def test_the_page_of_shared_flags_names_flags_that_there_are():
    lines = (ROOT / "docs/flags.md").read_text().splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    header, _, *rows = [[cell.strip(" `") for cell in line[1:]] for line in table]
    assert sorted(header) == [folder.name for folder in EXAMPLES]
    config = scripts.module("feedback_guard", "config").Config()
    for row in rows:
        for recipe, name in zip(header, row, strict=True):
            if recipe != "feedback_guard":
                assert name in flags(ROOT / "examples" / recipe / "train.py")
            elif name:
                assert operator.attrgetter(name)(config) is not None


# --- documents and the environment ----------------------------------------------------------------


def prose(page: Path) -> str:
    """A page of markdown without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub writes them in an address."""
    found = set()
    for line in prose(page).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip().lower()
            kept = re.sub(r"[^\w\- ]", "", heading)
            found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page
        if name:
            target = (page.parent / name).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def pinned(requirements: list[str]) -> dict[str, str]:
    """The versions of those that are pinned, by name."""
    return dict(line.split("==") for line in requirements if "==" in line)


def test_the_conda_environment_has_the_pins_of_pyproject():
    """All of them but two trackers, of which a user chooses one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = pinned(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        if name not in ("trackio", "wandb"):
            wanted |= pinned(extra)
    recipe = yaml.safe_load((ROOT / "conda-recipe.yaml").read_text())
    assert pinned(recipe["dependencies"][-1]["pip"]) == wanted


def test_no_file_names_a_machine():
    """Nor a folder beside this one: GUARDRAIL_RECIPES_DATA names the folder of real data."""
    places = "|".join([r"/(root|work)/", r"shared/(data|cases)", r"\.\./(shared)"])
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in listed.splitlines():
        path = ROOT / name
        if path.is_file():
            assert not re.search(places, path.read_text(encoding="utf-8", errors="ignore")), name
