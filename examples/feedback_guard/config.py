"""The config of a run: the keys of the original's research_config.json with their names and
meaning, and ours.

A config is a JSON file; what it leaves out has the original's value, or for our own keys the
default below. On the command line `--set section.key=value …` changes single values.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from common.conversation import UserError
from common.data import read_json
from common.run import expand_home

logger = logging.getLogger("feedback_guard")
FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
DEFAULT_ARMS = ("A2", "A3", "A4", "A5", "A6", "A7", "A8", "C1", "C2", "C3", "C4")


def as_tuple(value: Any) -> Any:
    """A list of a file, or `A4,C1` of the command line, as a tuple; each value may stand once."""
    if isinstance(value, str | int):
        value = [_plain(word.strip()) for word in str(value).split(",") if word.strip()]
    if not isinstance(value, list | tuple):
        return value
    if len({str(each) for each in value}) < len(value):
        raise ValueError("each value may stand once")
    return tuple(value)


def _plain(word: str) -> Any:
    """A word of the command line as what JSON makes of it, else as text."""
    try:
        return json.loads(word)
    except ValueError:
        return word


Share = Annotated[float, Field(ge=0, le=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Arms = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(as_tuple), Field(min_length=1)]
EngineName = Literal["transformers", "vllm", "server"]
Labeller = Literal["human", "judge", "guard"]  # whose word on a response counts


class Section(BaseModel):
    """A part of the config: unknown keys, other types, NaN and Infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SplitRatios(Section):
    train: Share = 0.7
    test: Share = 0.15
    validation: Share = 0.15

    @model_validator(mode="after")
    def add_up(self) -> "SplitRatios":
        if abs(self.train + self.test + self.validation - 1) > 1e-6:
            raise ValueError("train, test and validation must add up to 1")
        return self


class DatasetConfig(Section):
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


class ModelSection(Section):
    """A model behind one of the engines."""

    engine: EngineName = "transformers"
    server_url: str | None = None
    server_model: str | None = None
    server_timeout: PositiveFloat = 120.0  # seconds of silence that end a request

    @model_validator(mode="after")
    def server_has_an_address(self) -> "ModelSection":
        if self.engine == "server" and not self.server_url:
            raise ValueError("engine server needs server_url")
        return self

    def engine_options(self) -> dict[str, Any]:
        """Options of `load_guard` and `load_engine`."""
        names = {"engine", "server_url", "server_model"}
        if self.engine == "server":
            names.add("server_timeout")
        return self.model_dump(include=names)


class LlamaGuardConfig(ModelSection):
    default_model_path: str = "meta-llama/LlamaGuard-7b"  # judges, and is A0
    base_model_path: str = "meta-llama/LlamaGuard-7b"  # is trained
    use_official_template: bool = True  # false: templates/llama_guard.jinja
    load_in_4bit: bool = False  # the frozen base of training
    # let it name the categories of an unsafe response, for arms to learn them
    categories: bool = False
    legacy_new_tokens: PositiveInt = 50  # of the original's checks, for arms with its collection


class LlamaConfig(ModelSection):
    model_path: str = "mistralai/Mistral-7B-Instruct-v0.3"
    temperature: NonNegativeFloat = 0.7
    top_p: ShareAboveZero = 0.9
    max_tokens: PositiveInt = 1024
    samples: PositiveInt = 4  # responses to a prompt
    # the data set's own model_output, one a prompt, instead of generating
    use_recorded: bool = False

    @model_validator(mode="after")
    def samples_differ(self) -> "LlamaConfig":
        if self.temperature == 0 and self.samples > 1 and not self.use_recorded:
            raise ValueError("temperature 0 gives one response; set samples to 1")
        return self


class Headline(Section):
    """Arms that are trained with more seeds than the others."""

    arms: Arms = ("A8",)
    seeds: Seeds = (0, 1, 2)


class TrainingConfig(Section):
    output_dir: str = "./models/improved"
    batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 4
    learning_rate: PositiveFloat = 1e-5
    epochs: PositiveFloat = 3.0
    logging_steps: PositiveInt = 10
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    push_to_hub: bool = False  # each arm's finished adapter, to <hub_model_id>-<arm>-seed<k>
    hub_model_id: str | None = None  # null: the name of output_dir
    hub_private_repo: bool = True
    hub_overwrite: bool = False  # also where the repository holds what no recipe has pushed
    save_steps: PositiveInt = 100
    save_total_limit: PositiveInt = 3
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 100
    # of arms that arms.yaml gives none of their own; null: learning_rate
    arms_learning_rate: PositiveFloat | None = None
    arms_warmup_steps: NonNegativeInt | None = None  # the same; null: warmup_steps
    max_steps: Annotated[int, Field(ge=-1)] = -1  # the same for all arms; -1: by epochs
    arms: Arms = DEFAULT_ARMS
    seeds: Seeds = (0, 1, 2)
    headline: Headline | None = None
    lora_r: PositiveInt = 8
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lora_last_layers: PositiveInt | None = None  # adapters in the last so many layers; null: all
    kl_weight: NonNegativeFloat = 0.3
    safe_ratio: PositiveFloat = 1.0  # safe rows for each feedback row
    max_length: PositiveInt = 2048

    @model_validator(mode="after")
    def headline_is_trained(self) -> "TrainingConfig":
        if self.headline and not set(self.headline.arms) <= set(self.arms):
            raise ValueError("headline.arms names an arm that is not among arms")
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is trained with."""
        return self.headline.seeds if self.headline and arm in self.headline.arms else self.seeds


class EvaluationConfig(Section):
    improved_model_path: str = ""  # a trained arm's folder; "": all of training.output_dir
    results_dir: str = "./results/evaluation"
    max_eval_samples: PositiveInt | None = 1000  # of validation and of test; null: all
    judge: str = ""  # another guard that judges the responses, a spec of load_guard; "": none
    t2_label: Labeller = "guard"  # whose word on responses is the truth
    # spec of harmless prompts that look otherwise; "": rows of the data set marked so
    hard_benign: str = ""
    extra: Texts = ()  # specs of further data with labelled prompts
    draws: NonNegativeInt = 10_000  # of the bootstrap
    target_recall: ShareAboveZero = 0.8

    @model_validator(mode="after")
    def judge_is_named(self) -> "EvaluationConfig":
        if self.t2_label == "judge" and not self.judge:
            raise ValueError("t2_label judge needs a guard that judges: set judge")
        return self


class ExperimentConfig(Section):
    # nothing else: thresholds come from validation, results from test
    process_split: Literal["train"] = "train"
    process_sample_size: PositiveInt | None = 5000  # null: all
    results_dir: str = "./results/experiment"
    # of blocked prompts, let through to learn whether blocking was right
    explore_share: Share = 0.03
    refusal_filter: bool = True  # prompts whose responses refuse are no example of harmless ones
    # whose word blocks a response, and so is learned from; human: the labels of recorded ones
    blocked_by: Labeller = "guard"


class PrepareGuard(Section):
    """A small model that is made a guard before anything else."""

    base_model: str
    data: Texts
    output_dir: str
    max_steps: PositiveInt = 100
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-4
    last_layers: PositiveInt | None = None  # trained, with the final norm; null: all weights
    seed: NonNegativeInt = 0


class Prepare(Section):
    guard: PrepareGuard | None = None
    judge: PrepareGuard | None = None


class Config(Section):
    seed: NonNegativeInt = 42
    mode: Literal["process", "train", "evaluate", "full"] = "process"  # the original's, unused
    dataset: DatasetConfig = DatasetConfig()
    llama_guard: LlamaGuardConfig = LlamaGuardConfig()
    llama: LlamaConfig = LlamaConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    prepare: Prepare | None = None

    @model_validator(mode="after")
    def who_labels_responses_is_asked(self) -> "Config":
        truth = self.evaluation.t2_label
        blocks = self.experiment.blocked_by
        for field, who in (("evaluation.t2_label", truth), ("experiment.blocked_by", blocks)):
            if who == "human" and not self.llama.use_recorded:
                raise ValueError(f"{field} human needs llama.use_recorded=true")
        if blocks == "judge" and not self.evaluation.judge:
            raise ValueError("experiment.blocked_by judge needs a guard that judges: set judge")
        if blocks == "human" and truth == "guard":
            hint = "set evaluation.t2_label=human, or judge"
            raise ValueError(f"where people block responses the guard judges none; {hint}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The values as a config file would hold them."""
        return self.model_dump(mode="json")

    def prepared(self) -> dict[str, PrepareGuard]:
        """The guards that are made before anything else, by their names."""
        named = dict(self.prepare or ())
        return {name: part for name, part in named.items() if part is not None}


# --- reading --------------------------------------------------------------------------------------


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A config file, with `overrides` such as "training.max_steps=20".

    Raises:
        UserError: no JSON object, an unknown key, a value of the wrong type or out of its range.
    """
    values = read_json(path)
    _checked(values, str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected section.key=value")
        _set(values, key.strip().split("."), value)
    return _checked(values, f"{path} with --set")


def _set(values: dict[str, Any], keys: Sequence[str], text: str) -> None:
    """Change one value. The text is JSON; a word need not stand in quotes."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = _plain(text)


def _checked(values: Any, where: str) -> Config:
    try:
        return Config.model_validate(_with_home(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "unknown key"
        elif first["type"] != "missing" and not isinstance(first["input"], dict | BaseModel):
            said += f", found {first['input']!r:.60}"
        raise UserError(
            f"{where}, field {field}: {said}" if field else f"{where}: {said}"
        ) from None


def _with_home(value: Any) -> Any:
    """A value with `~` at the beginning of its texts as the home folder."""
    if isinstance(value, dict):
        return {key: _with_home(each) for key, each in value.items()}
    return expand_home(value)


def config_from_argv(doc: str | None = None) -> Config:
    """The config that the command line names; without --config that of the quickstart, and says so.

    Raises:
        UserError: anything wrong with the arguments or the file.
    """
    config, _ = parse_command_line(doc)
    return config


def parse_command_line(
    doc: str | None = None, flags: Sequence[str] = ()
) -> tuple[Config, argparse.Namespace]:
    """`config_from_argv`, and the values of a script's further flags, each a text or None."""
    parser = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="F.json", help="default: configs/quickstart.json")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="changes"
    )
    for flag in flags:
        parser.add_argument(flag)
    given = parser.parse_args()
    path = FOLDER / "configs" / "quickstart.json"
    if given.config:
        path = Path(expand_home(given.config))
    else:
        hint = "for the original's values: --config research_config.json"
        logger.info("Running %s (%s)", os.path.relpath(path), hint)
    return load_config(path, given.changes), given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")
