"""The finished folder of a run on the hub: pushed once, when it is whole, and private by default.

transformers' own `--push_to_hub` pushes the output folder at every save, half-made and with the
optimizer. Here the flag means the folder that the saver has written, loaded again and compared.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, with which this version speaks HTTP
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from common.conversation import UserError, one_line
from common.data.files import read_json
from common.run import is_main_process
from common.saving import CARD_FILE, OF_A_GUARD, is_unfinished

logger = logging.getLogger(__name__)
# run.json names files and folders of this machine
PUSHED = [name for name in OF_A_GUARD if name not in ("adapter", "run.json")] + ["adapter/*"]
TITLE = "A guard of Guardrail Recipes"  # of our commits: by it a repository is known as ours
OF_THE_HUB = ".gitattributes"  # what it puts into an empty repository
LOG_IN = "log in with `hf auth login`"
HINTS = {
    HFValidationError: "name another (--hub_model_id)",
    RevisionNotFoundError: "make that branch on the hub, or drop --hub_revision",
    LocalTokenNotFoundError: LOG_IN,
    OfflineModeIsEnabled: "",  # it says which variable to unset
}
OF_STATUS = {
    401: LOG_IN,
    403: "choose a token that may write there, on {}/settings/tokens",
    429: "try again later",
    500: "try again later",  # and what is above it
}


def check_push(args: TrainingArguments) -> None:
    """Refuse a push that would fail, or show the guard to everyone, before any work.

    Raises:
        UserError: nobody is logged in or may write there, the hub does not answer, no repository
            may have that name, it is public or somebody else's work, or a flag asks for what is
            half-made.
    """
    if args.hub_strategy != HubStrategy.END or args.hub_always_push:
        asked = f"--hub_strategy {args.hub_strategy.value}"
        if args.hub_always_push:
            asked = "--hub_always_push"
        raise UserError(f"{asked}: what is half-made is not pushed; drop the flag")
    if not is_main_process():
        return
    api = HfApi(token=args.hub_token)
    try:
        name = repository(args)
        validate_repo_id(name)
        _refuse_who_may_not_write(account(args.hub_token, api.endpoint), name, api.endpoint)
        public = not api.model_info(name).private
        in_the_way = other_work(api, name, args)
    except RepositoryNotFoundError:
        return
    except UserError:
        raise
    except Exception as error:  # the hub's errors, and those of the network, share no base class
        raise UserError(f"--push_to_hub: {fault(error, api)}") from None
    if public and args.hub_private_repo is not False:
        hint = "name another (--hub_model_id), or pass --hub_private_repo false"
        raise UserError(f"--push_to_hub: {name} is there and public; {hint}")
    if in_the_way:
        raise UserError(f"--push_to_hub: {in_the_way}")


def other_work(api: HfApi, name: str, args: TrainingArguments) -> str:
    """What is said of a repository with files to which no recipe has pushed: it must not be written
    over, unless `hub_overwrite` allows it. "" where nothing is in the way.
    """
    revision = args.hub_revision
    files = set(api.list_repo_files(name, revision=revision)) - {OF_THE_HUB}
    if args.hub_overwrite or not files:
        return ""
    titles = [commit.title for commit in api.list_repo_commits(name, revision=revision)]
    if TITLE in titles:
        return ""
    hint = "name another (hub_model_id), or allow it (hub_overwrite)"
    return f"{name} holds {min(files)} and was not pushed by a recipe; {hint}"


def repository(args: TrainingArguments) -> str:
    """The full name of the model on the hub: --hub_model_id, or the output folder's name.

    The hub is asked for the user even where the name has one: of a repository that a stranger asks
    for it says "not found", as of one that is free.
    """
    api = HfApi(token=args.hub_token)
    user = account(args.hub_token, api.endpoint)["name"]
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return name if "/" in name else f"{user}/{name}"


@cache
def account(token: str | None, endpoint: str) -> dict[str, Any]:
    """Who is logged in, with what. A hub is asked once, because it limits how often it says so."""
    return HfApi(endpoint, token).whoami()


def _refuse_who_may_not_write(who: dict[str, Any], name: str, endpoint: str) -> None:
    """Refuse a token that only reads, and a name under which others alone may write.

    A token with chosen rights (fine-grained) does not say here whether it may write.
    """
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        hint = OF_STATUS[403].format(endpoint)
        raise UserError(f"--push_to_hub: the token may only read; {hint}")
    owner, _, _ = name.partition("/")
    owners = [who["name"], *(one["name"] for one in who.get("orgs", []))]
    if owner not in owners:
        known = ", ".join(owners)
        raise UserError(f"--push_to_hub: {name} is not yours to make; you may push to {known}")


def push_finished(
    args: TrainingArguments, folder: Path | str | None = None, last: str = CARD_FILE
) -> None:
    """Push the finished folder in one commit, where --push_to_hub asks for it. One process pushes.

    Files of a guard that an earlier push has left there, and that are no longer in the folder, go
    in the same commit. Checkpoints, logs and results are not pushed.

    Args:
        folder: None is the output folder.
        last: the file that says that it is whole.

    Raises:
        UserError: the folder is not whole, the hub refuses it, or the repository holds somebody
            else's work; the folder stays as it is.
    """
    if not args.push_when_finished or not is_main_process():
        return
    folder = Path(folder or args.output_dir)
    if is_unfinished(folder, last) or not (folder / last).is_file():
        raise UserError(f"--push_to_hub: {folder} is not finished ({last} is missing)")
    for name in (CARD_FILE, "adapter_config.json", "adapter/adapter_config.json"):
        _say_local_paths(folder, name)
    api = HfApi(token=args.hub_token)
    private = args.hub_private_repo is not False
    try:
        name = repository(args)
        api.create_repo(name, private=private, exist_ok=True)
        in_the_way = other_work(api, name, args)
        if in_the_way:
            raise UserError(in_the_way)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=args.hub_revision,
            allow_patterns=PUSHED,
            delete_patterns=PUSHED,
            commit_message=TITLE,
        )
    except Exception as error:  # as in `check_push`
        again = f'hf upload REPOSITORY {folder} --commit-message "{TITLE}"'
        raise UserError(
            f"--push_to_hub: {fault(error, api)}; the guard is whole in {folder}: {again}"
        ) from None
    logger.info("Pushed %s to %s (%s)", folder, name, commit.oid[:8])


def _say_local_paths(folder: Path, name: str) -> None:
    """Warn of paths of this machine that are pushed, because base and data were named by them."""
    file = folder / name
    if not file.is_file():
        return
    found = sorted(set(_absolute_paths(read_json(file))))
    if found:
        hint = "name base and data by hub ids or relative paths to keep them to yourself"
        logger.warning("%s names paths of this machine (%s); %s", name, ", ".join(found), hint)


def _absolute_paths(value: Any) -> list[str]:
    """The texts in a JSON value that are absolute paths; keys are none."""
    if isinstance(value, str):
        return [value] if value.startswith("/") else []
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    found = []
    for part in value:
        found += _absolute_paths(part)
    return found


def fault(error: Exception, api: HfApi) -> str:
    """What went wrong with the hub, and what to do about it, in one line."""
    if isinstance(error, UserError):
        return str(error)
    said = one_line(error).rstrip(".")
    hint = what_to_do(error, api)
    return f"{said}; {hint}" if hint else said


def what_to_do(error: Exception, api: HfApi) -> str:
    """What helps against an error of the hub, or of the way to it; "" where nothing is known."""
    for kind, hint in HINTS.items():
        if isinstance(error, kind):
            return hint
    if isinstance(error, HfHubHTTPError):
        status = min(error.response.status_code, 500)
        return OF_STATUS.get(status, "").format(api.endpoint)
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return f"{api.endpoint} does not answer: look at the network, or try again later"
    return ""
