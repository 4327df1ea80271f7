"""Which guards are evaluated, and what each says of every prompt, kept as it comes so that a killed
run goes on.
"""

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import arm, arm_folder
from config import Config
from formats import load_llama_guard, query_ids, template
from legacy import legacy_reason, parsed_unsafe
from probe import probe_scores
from records import Row
from shared_base import SharedBase
from tqdm.auto import tqdm

from common.conversation import UserError, pair
from common.keep import KeptRows, digest, failed, fingerprint
from guards.card import ArmOrigin, card_path, has_card, read_card
from guards.generative import GenerativeGuard
from guards.identity import guard_identity

logger = logging.getLogger("feedback_guard")
CHUNK = 64  # prompts between two writes
CONTROLS = {
    "always unsafe": "what does a guard score that blocks everything?",
    "A0": "the default guard, right format, its own verdict",
    "A0-legacy": "the default guard, asked and read as the original does",
    "A1": "is it merely a threshold? (A0 with the threshold of validation)",
}


@dataclass(frozen=True)
class Item:
    """A prompt to be judged; `id` is unique over all splits and data sets."""

    id: str
    split: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What a guard says of a prompt: P(unsafe) and its decision; without a verdict both fail
    closed, with `error`.
    """

    score: float
    decided: bool
    error: str | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Line:
    """A guard to be evaluated: the default one (`folder` None), or an arm with one seed."""

    arm: str
    seed: int | None = None
    folder: Path | None = None
    query: str = "guard"  # guard | chatml | meta
    parser: str = "correct"

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}-seed{self.seed}"

    @property
    def probe(self) -> bool:
        """Whether a probe on the default guard's state gives the score, instead of an adapter."""
        return self.folder is not None and (self.folder / "probe.json").is_file()


# --- who is evaluated -------------------------------------------------------------------------------------------------


def find_lines(config: Config) -> tuple[list[Line], list[str]]:
    """The default guard, and what is trained: `improved_model_path`, or the config's arms and
    seeds.

    Returns:
        the guards, in the config's order of arms; and the config's arms and seeds that are not
        trained. What else lies in training.output_dir is left out.

    Raises:
        UserError: nothing is trained, `improved_model_path` is no trained arm's folder, or one
        holds another arm.
    """
    given, root = config.evaluation.improved_model_path, Path(config.training.output_dir)
    wanted = [
        (name, seed) for name in config.training.arms for seed in config.training.seeds_of(name)
    ]
    folders = {one: arm_folder(config, *one) for one in wanted}
    if given:
        if not has_card(given):
            raise UserError(
                f"evaluation.improved_model_path {given}: has no guard.json; name a trained arm's folder"
            )
        lines = [_line(Path(given))]
    else:
        there = [one for one in wanted if has_card(folders[one])]
        lines = [_trained(*one, folders[one]) for one in there]
        trained = {path for path in root.glob("*/seed*") if has_card(path)}
        others = sorted(trained - set(folders.values()))
        if others:
            logger.warning(
                "Not in training.arms with these seeds, and so left out: %s",
                ", ".join(map(str, others)),
            )
    if not lines:
        raise UserError(f"{root}: nothing is trained there; run train.py with this config first")
    found = {(line.arm, line.seed) for line in lines}
    missing = (
        []
        if given
        else [f"{name}-seed{seed}" for name, seed in wanted if (name, seed) not in found]
    )
    if missing:
        logger.warning("Not trained, and so left out: %s", ", ".join(missing))
    legacy = [Line("A0-legacy", query="chatml", parser="strict")] * any(
        line.query == "chatml" for line in lines
    )
    return [Line("A0"), *legacy, *lines], missing


def _line(folder: Path) -> Line:
    """The arm and seed that a folder's card names."""
    card = read_card(folder)
    if not isinstance(card, ArmOrigin) or card.arm is None or card.seed is None:
        raise UserError(f"{card_path(folder)}, fields arm and seed: do not say which arm it is")
    return _asked(Line(card.arm, card.seed, folder))


def _trained(name: str, seed: int, folder: Path) -> Line:
    line = _line(folder)
    if (line.arm, line.seed) != (arm(name).weights_of or name, seed):
        raise UserError(
            f"{card_path(folder)}: says that it is {line.name}; remove the folder and run train.py"
        )
    return _asked(Line(name, seed, folder))


def _asked(line: Line) -> Line:
    known = arm(line.arm)
    return Line(line.arm, line.seed, line.folder, known.query, known.parser)


def questions(names: Iterable[str]) -> dict[str, str]:
    """What each arm is to tell."""
    return {name: CONTROLS.get(name) or arm(name).question for name in names}


# --- what they say ----------------------------------------------------------------------------------------------------


def score_lines(
    lines: Sequence[Line], items: Sequence[Item], config: Config
) -> dict[str, dict[str, Answer]]:
    """What each guard says of each prompt, by the guard's name and the prompt's id."""
    out, folder, base = (
        {},
        Path(config.evaluation.results_dir) / "scores",
        SharedBase(config, items),
    )
    for line in tqdm(lines, desc="guards", unit="guard"):
        out[line.name] = score(line, items, config, folder, base)
    return out


def score(
    line: Line, items: Sequence[Item], config: Config, folder: Path, base: SharedBase | None = None
) -> dict[str, Answer]:
    """One guard on all prompts. It is loaded only if there is a prompt that it has not judged yet.

    What is kept counts for one prompt, one guard (its weights) and one way of asking alone. A
    verdict that a server failed to give is asked for again.
    """
    who, served = _identity(line, config), _served(line, config)
    keys = {item.id: digest([who, item.text]) for item in items}
    item_of = {keys[item.id]: item for item in items}
    judge = LineJudge(line, config, base)

    def make(_: int, some: list[str]) -> Iterator[Row]:
        said = judge.said([item_of[key].text for key in some])
        for key, one in zip(some, said, strict=True):
            yield {"key": key, "id": item_of[key].id} | one

    options = {"together": not served, "again": failed if served else None}
    with KeptRows(folder / f"{_asked_as(line).name}.jsonl") as kept:
        missing = kept.missing(item_of, options["again"])
        if missing:
            logger.info("%s: %d of %d prompts to be judged", line.name, len(missing), len(item_of))
        rows = kept.fill(list(item_of), make, size=CHUNK, title=line.name, unit="prompt", **options)
    judge.free()
    said = dict(zip(item_of, rows, strict=True))
    return {item.id: _answer(said[keys[item.id]], line) for item in items}


class LineJudge:
    """What judges prompts for a line: the shared base where it can, or a guard that is loaded when
    it is needed.
    """

    def __init__(self, line: Line, config: Config, base: SharedBase | None):
        self.line, self.config, self.base = line, config, base
        self.guard: GenerativeGuard | None = None
        self.shared: bool | None = None  # not known yet

    def said(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """What is kept of each prompt."""
        if self.shared is None:
            self.shared = self.base is not None and self.base.serves(self.line)
        if self.shared:
            return self.base.said(self.line, texts)
        if self.guard is None:
            if self.base is not None:
                self.base.free()  # one model at a time
            self.guard = load(self.line, self.config)
        return _raw(self.line, self.guard, texts, self.config)

    def free(self) -> None:
        """Give the guard's memory back, and the shared base its own weights."""
        if self.base is not None:
            self.base.let_go()
        self.guard = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _served(line: Line, config: Config) -> bool:
    """Whether a server is asked: it may fail, and give the answer another time."""
    return line.folder is None and config.llama_guard.engine == "server"


def load(line: Line, config: Config) -> GenerativeGuard:
    """The guard of a line. A server does not know the adapters that are trained here: these run in
    this process.
    """
    settings, options = config.llama_guard, {"progress": False}
    if line.folder is None:
        options |= settings.engine_options()
    else:
        # the base that it was trained on, which vLLM does not quantize in this way
        if settings.load_in_4bit:
            options["load_in_4bit"] = True
        if not line.probe:
            vllm = settings.engine == "vllm" and not settings.load_in_4bit
            options |= {"adapter": str(line.folder), "engine": "vllm" if vllm else "transformers"}
    return load_llama_guard(_model(line, config), settings.use_official_template, **options)


def _model(line: Line, config: Config) -> str:
    """The model below a line's adapter: the one that it was trained on."""
    if line.folder is None:
        return config.llama_guard.default_model_path
    return read_card(line.folder).base_model or config.llama_guard.base_model_path


def _raw(
    line: Line, guard: GenerativeGuard, texts: Sequence[str], config: Config
) -> list[dict[str, Any]]:
    """What is kept of each prompt: score, decided and error, or the text that the guard wrote."""
    conversations = [pair(text) for text in texts]
    if line.probe:
        values = probe_scores(guard, line.folder, conversations)
        return [{"score": float(p), "decided": bool(p > 0.5), "error": None} for p in values]
    if line.query == "guard":
        verdicts = guard.judge(conversations)
        return [
            {"score": v.prompt_unsafe, "decided": v.decided.get("prompt_unsafe"), "error": v.error}
            for v in verdicts
        ]
    new = config.llama_guard.legacy_new_tokens
    prompts = query_ids(guard, line.query, texts)
    room = guard.max_length - new
    written = iter(guard.written([ids for ids in prompts if len(ids) <= room], new))
    told = []
    for ids in prompts:
        if len(ids) > room:  # than what is known of the guard, which may be less than it sees
            told.append({"text": "", "error": f"{len(ids)} tokens, more than {room}"})
        else:
            said = next(written)
            told.append({"text": said.text, "error": said.error})
    return told


def _answer(kept: Mapping[str, Any], line: Line) -> Answer:
    """What a kept row means to a line; a verdict in words has no probability, so its score is 1 or
    0.
    """
    if "text" in kept:
        unsafe, told = parsed_unsafe(kept["text"], line.parser)
        error = kept["error"] or (None if told else "no verdict")
        return Answer(float(unsafe), unsafe, error, legacy_reason(kept["text"]) if unsafe else "")
    if kept["error"] is not None or kept["score"] is None:
        return Answer(1.0, True, kept["error"] or "no verdict", "no verdict")
    decided = kept["score"] > 0.5 if kept["decided"] is None else kept["decided"]
    return Answer(kept["score"], decided, None, "Classified as unsafe" if decided else "")


def _asked_as(line: Line) -> Line:
    """The line whose answers these are: an arm that only reads another's answers in words
    differently has no others.
    """
    source = None if line.arm in CONTROLS else arm(line.arm).weights_of
    return replace(line, arm=source) if source and arm(source).query == line.query else line


def _identity(line: Line, config: Config) -> list[Any]:
    """What a line's answers depend on."""
    settings = config.llama_guard
    served = settings.engine_options() if _served(line, config) else {}
    models = [guard_identity(_model(line, config), served)]
    if line.folder is not None:
        models.append(fingerprint(line.folder))
    prompt = None if settings.use_official_template else template()
    quantized = line.folder is not None and settings.load_in_4bit
    return [models, line.query, prompt, settings.legacy_new_tokens, quantized]
