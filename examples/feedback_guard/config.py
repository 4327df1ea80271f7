"""The config of a run: the keys of the original's research_config.json with their names and
meaning, and ours.

A config is a JSON file; what it leaves out has the original's value, or for our own keys the
default below. On the command line `--set section.key=value …` changes single values.
"""

import argparse
import difflib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from common.conversation import UserError
from common.data import read_json
from common.run import expand_home

logger = logging.getLogger("feedback_guard")
FOLDER = Path(__file__).resolve().parent
STAGES = ("process", "train", "evaluate", "full")
SPLITS = ("train", "validation", "test")
ENGINES = ("transformers", "vllm", "server")
ALL_ARMS = (  # of arms.yaml; A0 and A1, which train nothing, always stand beside them
    *("A2", "A2-parser", "A2-format", "A2-rate", "A2-mask", "A2-augmentation", "A2-labels"),
    *("A3", "A4", "A5", "A6", "A7", "A8", "C1", "C2", "C3", "C4"),
)


@dataclass(frozen=True)
class SplitRatios:
    train: float = 0.7
    test: float = 0.15
    validation: float = 0.15


@dataclass(frozen=True)
class DatasetConfig:
    # hub id, folder with train and test files, one file, or a spec of common.data
    path: str = "lmsys/toxic-chat"
    config: str | None = "toxicchat0124"  # of a hub data set
    # of official splits only `validation` counts: that share of train
    split_ratios: SplitRatios = SplitRatios()
    store_dir: str = "./data/dataset"
    # put all splits together and split anew by split_ratios, as the original does
    resplit: bool = False
    # rows that the guard was trained on: prompts that stand there too are left out
    guard_path: str | None = None


@dataclass(frozen=True)
class LlamaGuardConfig:
    default_model_path: str = "meta-llama/LlamaGuard-7b"  # judges, and is A0
    base_model_path: str = "meta-llama/LlamaGuard-7b"  # is trained
    use_official_template: bool = True  # false: templates/llama_guard.jinja
    engine: str = "transformers"
    server_url: str | None = None
    server_model: str | None = None
    server_timeout: float = 120.0  # seconds of silence that end a request
    load_in_4bit: bool = False  # the frozen base of training
    # let it name the categories of an unsafe response, for arms to learn them
    categories: bool = False
    legacy_new_tokens: int = 50  # of the original's checks, for arms with its collection


@dataclass(frozen=True)
class LlamaConfig:
    model_path: str = "mistralai/Mistral-7B-Instruct-v0.3"
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 1024
    samples: int = 4  # responses to a prompt
    engine: str = "transformers"
    server_url: str | None = None
    server_model: str | None = None
    server_timeout: float = 120.0  # seconds of silence that end a request
    batch_size: int | None = None  # of transformers; samples depend on it
    # the data set's own model_output, one a prompt, instead of generating
    use_recorded: bool = False


@dataclass(frozen=True)
class Headline:
    """Arms that are trained with more seeds than the others."""

    arms: tuple[str, ...] = ("A8",)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class TrainingConfig:
    output_dir: str = "./models/improved"
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-5
    epochs: float = 3
    logging_steps: int = 10
    save_steps: int = 100
    save_total_limit: int = 3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    # of arms that arms.yaml gives none of their own; null: learning_rate
    arms_learning_rate: float | None = None
    arms_warmup_steps: int | None = None  # the same; null: warmup_steps
    max_steps: int = -1  # the same for all arms; -1: by epochs
    arms: tuple[str, ...] = ALL_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    headline: Headline | None = None
    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_last_layers: int | None = None  # adapters in the last so many layers; null: in all
    kl_weight: float = 0.3
    safe_ratio: float = 1.0  # safe rows for each feedback row
    max_length: int = 2048
    # of the original's texts (A2 …), ten times as long; null: batch_size
    text_batch_size: int | None = None

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is trained with."""
        return self.headline.seeds if self.headline and arm in self.headline.arms else self.seeds


@dataclass(frozen=True)
class EvaluationConfig:
    improved_model_path: str = ""  # a trained arm's folder; "": all of training.output_dir
    results_dir: str = "./results/evaluation"
    max_eval_samples: int | None = 1000  # of validation and of test; null: all
    judge: str = ""  # another guard that judges the responses, a spec of load_guard; "": none
    t2_label: str = "guard"  # whose word on responses is the truth: human | judge | guard
    # spec of harmless prompts that look otherwise; "": rows of the data set marked so
    hard_benign: str = ""
    extra: tuple[str, ...] = ()  # specs of further data with labelled prompts
    draws: int = 10_000  # of the bootstrap
    target_recall: float = 0.8


@dataclass(frozen=True)
class ExperimentConfig:
    process_split: str = "train"  # nothing else: the other splits measure
    process_sample_size: int | None = 5000  # null: all
    results_dir: str = "./results/experiment"
    # of blocked prompts, let through to learn whether blocking was right
    explore_share: float = 0.03
    refusal_filter: bool = True  # prompts whose responses refuse are no example of harmless ones


@dataclass(frozen=True)
class PrepareGuard:
    """A small model that is made a guard before anything else."""

    base_model: str
    data: tuple[str, ...]
    output_dir: str
    max_steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-4
    last_layers: int | None = None  # trained, with the final norm; null: all weights
    seed: int = 0


@dataclass(frozen=True)
class Prepare:
    guard: PrepareGuard | None = None
    judge: PrepareGuard | None = None


@dataclass(frozen=True)
class Config:
    seed: int = 42
    mode: str = "process"  # the stage that full.py runs when it is not told one
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    llama_guard: LlamaGuardConfig = field(default_factory=LlamaGuardConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    prepare: Prepare | None = None

    def as_dict(self) -> dict[str, Any]:
        """The values as a config file would hold them."""
        return json.loads(json.dumps(asdict(self)))


# --- reading ----------------------------------------------------------------------------------------------------------


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config file, with `overrides` such as "training.max_steps=20".

    Raises:
        UserError: no JSON object, an unknown key (the nearest known one is named), a value of the
        wrong type or out of
            its range.
    """
    config = _build(Config, read_json(path), f"{path}", "")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected section.key=value")
        values = _with(config, key.strip().split("."), value, f"--set {key}")
        config = _build(Config, values, "--set", "")
    check(config, f"{path} with --set" if overrides else str(path))
    return config


def config_from_argv(doc: str | None = None, stages: Sequence[str] = ()) -> Config:
    """The config that the command line names; without --config that of the quickstart, and says so.

    Args:
        doc: the script's docstring, for --help.
        stages: the words that the command may begin with; the one that stands there is the config's
        `mode`.

    Raises:
        UserError: anything wrong with the arguments or the file.
    """
    parser = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if stages:
        parser.add_argument("stage", nargs="?", choices=stages, help="default: the config's `mode`")
    parser.add_argument("--config", metavar="F.json", help="default: configs/quickstart.json")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        dest="overrides",
    )
    given = parser.parse_args()
    path = (
        Path(expand_home(given.config)) if given.config else FOLDER / "configs" / "quickstart.json"
    )
    if not given.config:
        logger.info(
            "Running %s (for the original's values: --config research_config.json)",
            os.path.relpath(path),
        )
    config = load_config(path, given.overrides)
    return replace(config, mode=given.stage) if stages and given.stage else config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def _build(kind: Any, value: Any, where: str, name: str) -> Any:
    """`value` as a `kind`: a dataclass, a union with None, a tuple of one kind, or a plain type."""
    if get_origin(kind) is UnionType:
        return (
            None
            if value is None
            else _build(next(k for k in get_args(kind) if k is not NoneType), value, where, name)
        )
    expected = (
        "an object"
        if is_dataclass(kind)
        else "a list"
        if get_origin(kind) is tuple
        else kind.__name__
    )
    if is_dataclass(kind) and isinstance(value, Mapping):
        known = get_type_hints(kind)
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0)
                raise UserError(
                    f"{where}, field {name}{key}: unknown key; the nearest known one is {name}{near[0]}"
                )
        needed = [
            f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
        ]
        if missing := [key for key in needed if key not in value]:
            raise UserError(f"{where}, field {name}{missing[0]}: missing")
        return kind(
            **{key: _build(known[key], each, where, f"{name}{key}.") for key, each in value.items()}
        )
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_build(get_args(kind)[0], each, where, name) for each in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(
            f"{where}, field {name.rstrip('.')}: expected {expected}, found {value!r:.60}"
        )
    return expand_home(value)


def _with(config: Config, keys: Sequence[str], text: str, where: str) -> dict[str, Any]:
    """The config's values with one changed. `text` is JSON; a name need not stand in quotes, nor a
    list in brackets.
    """
    values = part = config.as_dict()
    kind: Any = Config
    for i, key in enumerate(keys):
        known = get_type_hints(kind) if is_dataclass(kind) else {}
        if key not in known:
            name, near = ".".join(keys[: i + 1]), difflib.get_close_matches(key, known, 1, 0)
            said = f"; the nearest known one is {'.'.join([*keys[:i], near[0]])}" if near else ""
            raise UserError(f"{where}: {name} is an unknown key{said}")
        kind = next((k for k in get_args(known[key]) if is_dataclass(k)), known[key])
        if i < len(keys) - 1:
            part[key] = part.get(key) or {}
            part = part[key]
    part[keys[-1]] = _value(text, kind)
    return values


def _value(text: str, kind: Any) -> Any:
    optional = get_origin(kind) is UnionType
    if optional and text == "null":
        return None
    kind = next(k for k in get_args(kind) if k is not NoneType) if optional else kind
    if kind is str:
        return text
    if get_origin(kind) is tuple and not text.lstrip().startswith("["):
        return [_value(word.strip(), get_args(kind)[0]) for word in text.split(",") if word.strip()]
    try:
        return json.loads(text)
    except ValueError:
        return text  # the wrong type, which is said with the key's name


def engine_options(section: LlamaGuardConfig | LlamaConfig) -> dict[str, Any]:
    """Options of `load_guard` and `load_engine`: a section's engine, and where its server is."""
    options = {
        "engine": section.engine,
        "server_url": section.server_url,
        "server_model": section.server_model,
    }
    if section.engine == "server":
        options["server_timeout"] = section.server_timeout
    return options


# --- checking ---------------------------------------------------------------------------------------------------------


def check(config: Config, where: str) -> None:
    """Raise UserError for the first value that is out of its range, or does not go with another."""
    guard, llama, training = config.llama_guard, config.llama, config.training
    evaluation, experiment, ratios = (
        config.evaluation,
        config.experiment,
        config.dataset.split_ratios,
    )
    choices = [
        ("mode", config.mode, STAGES),
        ("llama_guard.engine", guard.engine, ENGINES),
        ("llama.engine", llama.engine, ENGINES),
        ("evaluation.t2_label", evaluation.t2_label, ("human", "judge", "guard")),
    ]
    for name, value, known in choices:
        if value not in known:
            raise UserError(f"{where}, field {name}: {value!r} is none of {', '.join(known)}")
    if experiment.process_split != "train":
        raise UserError(
            f"{where}, field experiment.process_split: expected train, found {experiment.process_split!r}; thresholds "
            "come from validation and results from test, so nothing may be learned there"
        )
    shares = [(f"dataset.split_ratios.{name}", getattr(ratios, name)) for name in SPLITS]
    shares += [("experiment.explore_share", experiment.explore_share), ("llama.top_p", llama.top_p)]
    shares += [("evaluation.target_recall", evaluation.target_recall)]
    for name, value in shares:
        least = 1e-9 if name in ("llama.top_p", "evaluation.target_recall") else 0
        if not least <= value <= 1:
            raise UserError(
                f"{where}, field {name}: expected {'above 0' if least else '0'} to 1, found {value}"
            )
    if abs(sum(getattr(ratios, name) for name in SPLITS) - 1) > 1e-6:
        raise UserError(
            f"{where}, field dataset.split_ratios: train, test and validation must add up to 1"
        )
    for section in (
        llama,
        training,
        evaluation,
        experiment,
        guard,
        *filter(None, _prepared(config)),
    ):
        name = next((n for n in vars(config) if getattr(config, n) is section), "prepare")
        for key, value in vars(section).items():
            least = {"max_steps": -1, "seed": 0, **dict.fromkeys(ZERO_ALLOWED, 0)}.get(key, 1e-12)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not value >= least
            ):
                said = "above 0" if least == 1e-12 else f"{least} or more"
                raise UserError(f"{where}, field {name}.{key}: expected {said}, found {value}")
    _check_together(config, where)


ZERO_ALLOWED = (
    "temperature",
    "weight_decay",
    "warmup_steps",
    "arms_warmup_steps",
    "kl_weight",
    "lora_dropout",
    "explore_share",
    "draws",
)


def _prepared(config: Config) -> tuple[PrepareGuard | None, PrepareGuard | None]:
    return (config.prepare.guard, config.prepare.judge) if config.prepare else (None, None)


def _check_together(config: Config, where: str) -> None:
    training, evaluation = config.training, config.evaluation
    if config.seed < 0:
        raise UserError(f"{where}, field seed: expected 0 or more, found {config.seed}")
    for name, section in (("llama_guard", config.llama_guard), ("llama", config.llama)):
        if section.engine == "server" and not section.server_url:
            raise UserError(f"{where}, field {name}.server_url: the engine server needs it")
    if config.llama.temperature == 0 and config.llama.samples > 1 and not config.llama.use_recorded:
        raise UserError(
            f"{where}, field llama.samples: temperature 0 gives one response; set samples to 1"
        )
    lists = [("arms", training.arms), ("seeds", training.seeds)]
    if training.headline:
        lists += [
            ("headline.arms", training.headline.arms),
            ("headline.seeds", training.headline.seeds),
        ]
    for name, values in lists:
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"{where}, field training.{name}: expected one or more, each once, found {list(values)}"
            )
        if name.endswith("seeds") and min(values) < 0:
            raise UserError(
                f"{where}, field training.{name}: expected 0 or more, found {min(values)}"
            )
    if training.lora_dropout >= 1:
        raise UserError(
            f"{where}, field training.lora_dropout: expected below 1, found {training.lora_dropout}"
        )
    if training.headline and (odd := set(training.headline.arms) - set(training.arms)):
        raise UserError(
            f"{where}, field training.headline.arms: {sorted(odd)[0]} is not among training.arms"
        )
    if evaluation.t2_label == "judge" and not evaluation.judge:
        raise UserError(
            f"{where}, field evaluation.judge: t2_label judge needs a guard that judges"
        )
    if evaluation.t2_label == "human" and not config.llama.use_recorded:
        raise UserError(
            f"{where}, field evaluation.t2_label: human labels are of recorded responses; set llama.use_recorded=true"
        )
