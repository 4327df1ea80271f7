"""What is said of a push that the hub does not take: its real client, and a hub of this machine."""

import json

import pytest
from checks import user_error
from hub_server import ORGANISATION, TOKEN, USER, hub_server
from huggingface_hub import HfApi, constants

from common.hub import check_push, push_finished, what_to_do
from common.training import RecipeTrainingArguments

NOBODY_LISTENS = "http://127.0.0.1:9"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that clients of this process ask; nobody is logged in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        yield hub


@pytest.fixture
def arguments(tmp_path):
    """`arguments(**flags)`: of a run that pushes what it has trained to somebody/guard."""

    def make(**flags) -> RecipeTrainingArguments:
        given = {"output_dir": str(tmp_path / "guard"), "hub_token": TOKEN} | flags
        return RecipeTrainingArguments(push_to_hub=True, **given)

    return make


def test_a_name_that_is_free_may_be_pushed_to(hub, arguments):
    check_push(arguments())
    check_push(arguments(hub_model_id=f"{USER}/other"))
    check_push(arguments(hub_model_id=f"{ORGANISATION}/guard"))
    assert hub.asked.count("GET /api/whoami-v2") == 1  # which the hub limits


def test_who_may_not_write_there_is_told_before_any_work(hub, arguments):
    with user_error("--push_to_hub: strangers/guard is not yours to make; you may push to"):
        check_push(arguments(hub_model_id="strangers/guard"))


def test_a_token_that_only_reads_is_refused_before_any_work(hub, arguments):
    hub.role = "read"
    with user_error("the token may only read; choose a token that may write there"):
        check_push(arguments())


FAULTS = {  # what the hub answers: what helps
    401: "log in with `hf auth login`",
    403: "choose a token that may .*/settings/tokens",
    429: "try again later",
    500: "try again later",
    503: "try again later",
}


@pytest.mark.parametrize(("status", "hint"), FAULTS.items())
def test_what_the_hub_refuses_is_said_with_what_helps(hub, arguments, status, hint):
    hub.fault = status
    with user_error(f"--push_to_hub: .*; {hint}$"):
        check_push(arguments())


@pytest.mark.parametrize("name", [None, f"{USER}/guard"], ids=["a folder's", "with a user"])
def test_nobody_is_logged_in(hub, arguments, name):
    with user_error(r"; log in with `hf auth login`$"):
        check_push(arguments(hub_token=None, hub_model_id=name))


@pytest.mark.parametrize("name", ["my guard", f"{USER}/guard-", "a/b/c", "g" * 97])
def test_a_name_that_no_repository_may_have(hub, arguments, name):
    """The hub's rule is said, and no word of a log-in."""
    with user_error(r"[Rr]epo id must .*; name another") as error:
        check_push(arguments(hub_model_id=name))
    assert "log in" not in str(error.value)


def test_a_branch_that_is_not_there(hub, arguments):
    hub.add("models", f"{USER}/guard", {"README.md": "Mine."}, private=True)
    with user_error("make that branch on the hub, or drop --hub_revision"):
        check_push(arguments(hub_revision="next"))


def test_no_network(hub, arguments, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY_LISTENS)
    with user_error(f"{NOBODY_LISTENS} does not answer: .* try again later"):
        check_push(arguments())


def test_a_fault_of_this_machine_is_not_put_down_to_the_network(hub):
    assert what_to_do(FileNotFoundError("model.safetensors"), HfApi()) == ""


def test_paths_of_this_machine_are_named(hub, arguments, tmp_path, caplog):
    """As they are, and a key is no path."""
    folder = tmp_path / "guard"
    folder.mkdir()
    base = {"/key": "value", "base": ['/mine/"a" ü']}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    push_finished(arguments(), last="adapter_config.json")
    assert 'names paths of this machine (/mine/"a" ü);' in caplog.text


def test_offline_says_which_variable(hub, arguments, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with user_error("unset the `HF_HUB_OFFLINE`") as error:
        check_push(arguments())
    assert "log in" not in str(error.value)


def test_a_push_that_fails_at_the_end_says_the_same_and_where_the_guard_is(
    hub, arguments, tmp_path
):
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    hub.fault = 503
    message = f"try again later; the guard is whole in {folder}: hf upload"
    with user_error(message):
        push_finished(arguments(), last="adapter_config.json")
