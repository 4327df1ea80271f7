"""guards/suite/judge.py: which guard is meant, when kept verdicts are its own, and tables of guards
that differ.
"""

import os
import shutil

import completions
import families
import pytest
import test_suite_evaluate as shared
from checks import user_error
from transformers import AutoTokenizer

import common.templates
from guards import zoo
from guards.card import GenerativeCard, LoraCard, write_card
from guards.known import ALIASES
from guards.suite.benchmarks import paper, split_spec

evaluate, judge, candidate, cells = shared.evaluate, shared.judge, shared.candidate, shared.cells
arguments, file, run = shared.arguments, shared.file, shared.run  # fixtures
serve = completions.serve  # a fixture
OPTIONS = {"engine": "vllm", "long_inputs": "error", "trust_remote_code": True}


def lora_card(base: str = "some/base") -> LoraCard:
    return LoraCard(
        template="lora_guard",
        labels=["unsafe"],
        inputs=["pair"],
        max_length=512,
        num_hidden_layers=None,
        head_bias=None,
        base_model=base,
    )


def identity(spec: str) -> str:
    return judge.candidates([spec], {})[0].identity


# --- which guard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "template"),
    [
        ("wildguard", "wildguard"),
        ("gpt-oss-safeguard-20b", "gpt_oss_safeguard"),
        ("some/classifier:template=last_turn", "last_turn"),
        ("{folder}", "lora_guard"),
    ],
)
def test_another_prompt_is_another_guard(tmp_path, monkeypatch, spec, template):
    """The prompt's text counts, and not only its name."""
    prompts = tmp_path / "prompts"
    for folder in common.templates.FOLDERS:
        shutil.copytree(folder, prompts, dirs_exist_ok=True)
    monkeypatch.setattr(common.templates, "FOLDERS", [prompts])
    write_card(tmp_path, lora_card())
    spec = spec.format(folder=tmp_path)
    before = identity(spec)
    path = prompts / f"{template}.jinja"
    path.write_text(path.read_text() + "!")
    assert identity(spec) != before


@pytest.mark.parametrize(
    "spec", ["llama-guard:adapter={part}", "llama-guard:model={part}", "{guard}"]
)
def test_other_weights_are_another_guard(tmp_path, spec):
    """Of the adapter, and of the base model that guard.json names; by content, whatever their
    date.
    """
    guard = tmp_path / "guard"
    weights = tmp_path / "part/adapter_model.safetensors"
    weights.parent.mkdir()
    write_card(guard, lora_card(str(weights.parent)))
    spec = spec.format(part=weights.parent, guard=guard)
    weights.write_text("weights")
    before = identity(spec)
    os.utime(weights, (1, 1))
    assert identity(spec) == before
    weights.write_text("another")  # as long
    os.utime(weights, (1, 1))
    assert identity(spec) != before


def test_a_guard_that_moved_is_the_same(tmp_path):
    guard = tmp_path / "guard"
    write_card(guard, lora_card())
    (guard / "adapter_model.safetensors").write_text("weights")
    copy = shutil.copytree(guard, tmp_path / "copy")
    assert identity(str(copy)) == identity(str(guard))


def test_a_guard_of_the_zoo_by_any_of_its_names(tmp_path):
    """The papers' names, with and without a folder, and its adapter's id, but not its base's."""
    names = {name: ours for name, ours in ALIASES.items() if zoo()[ours]["kind"] != "api"}
    names["nvidia/llama-3.1-nemoguard-8b-content-safety"] = "nemoguard-8b"
    for name, ours in names.items():
        (found,) = judge.candidates([name], {})
        assert found.name == found.zoo == ours
        assert found.released
    here, base = judge.candidates([f"ExpGuard={tmp_path}", "meta-llama/Llama-3.1-8B-Instruct"], {})
    assert here.name == here.zoo == "expguard"
    assert base.zoo is None
    assert not base.released


PROMPTS = "expguardtest toxicchat openai_mod xstest_prompt_harm harmbench aegis_safety_dataset2"
RESPONSES = "expguardtest beavertails saferlhf harmbench aegis_safety_dataset2"


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("prompt", f"{PROMPTS} wildguardtest_prompt"),
        ("response", f"{RESPONSES} wildguardtest_response"),
    ],
)
def test_the_papers_names_of_benchmarks(task, names):
    found = [split_spec(f"{name}:{task}")[0] for name in names.split()]
    assert found == paper()["tasks"][task]


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("wildgard", "wildguard"),
        ("LlamaGuard4", "LlamaGuard3, LlamaGuard2"),
        ("llama-guard-3", "llama-guard-3-8b"),
        ("expgaurd={folder}", "expguard"),
    ],
)
def test_a_guards_name_that_is_none(tmp_path, spec, near):
    with user_error(rf"--guards .*; near it: .*{near}"):
        judge.candidates([spec.format(folder=tmp_path)], {})


def test_options_for_all_go_to_guards_that_take_them(tmp_path, monkeypatch):
    """What is said of one guard goes to it in any case, where it is an error."""
    monkeypatch.setattr(judge, "load_guard", lambda spec, **options: options)
    write_card(tmp_path, GenerativeCard(guard="expguard", max_length=512))
    specs = ["wildguard", str(tmp_path), "detoxify", "openai-moderation", "detoxify:engine=vllm"]
    given = [guard.load() for guard in judge.candidates(specs, OPTIONS)]
    assert not any(options.pop("progress") for options in given)
    local = {"trust_remote_code": True, "long_inputs": "error"}
    served = {"engine": "vllm"} | local
    assert given == [served, served, local, {}, served]


def test_how_long_a_server_is_waited_for_says_nothing_of_its_verdicts(arguments):
    """So what was judged counts with any time-out."""
    options = {"engine": "server", "server_url": "http://127.0.0.1:1/v1"}
    identities = set()
    for seconds in (9.0, 99.0):
        given = evaluate.guard_options(arguments(**options, server_timeout=seconds))
        assert given["server_timeout"] == seconds
        (guard,) = judge.candidates(["wildguard"], given)
        identities.add(guard.identity)
    assert len(identities) == 1


@pytest.mark.parametrize(
    "option", ["server_url=http://me:pass@host/v1", "base_url=https://host/v1?key=pass"]
)
def test_no_password_goes_into_the_results(arguments, option):
    with user_error("without user, query") as caught:
        judge.candidates([f"openai-moderation:{option}"], {})
    assert "pass" not in str(caught.value)
    with user_error("--server_url: expected http"):
        evaluate.guard_options(arguments(server_url=option.partition("=")[2]))


def test_a_servers_name_for_a_guard_is_one_guards(run):
    one = candidate()
    other = candidate("other")
    with user_error("--server_model: is one guard's"):
        run(one, other, server_model="m")
    run(one, server_model="m")
    assert not other.load.made


def test_errors_of_a_real_server(arguments, run, tmp_path, serve):
    """A prompt that it refuses and an answer that cannot be read are not asked again; an answer
    that came from something else on the way is.
    """
    families.save(tmp_path / "model", "mistral", ["yes", "no", "n/a"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = []

    def rule(body):
        text = tokenizer.decode(body["prompt"])
        asked.append(text)
        if "bad dog" in text:
            return 400, {"error": {"message": "no such text here"}}
        if "bad cow" in text:
            return completions.HTML
        start = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + " no", add_special_tokens=False)["input_ids"]
        said = 0 if "bad cat" in text else ids[len(start)]
        others = dict.fromkeys(range(len(tokenizer)), -9.0)
        return completions.token({said: 0.0} | others | {said: 0.0})

    options = {"engine": "server", "server_url": serve(rule).url, "server_model": "m"}
    options["benchmarks"] = arguments().benchmarks[:1]
    given = evaluate.guard_options(arguments(**options))
    (guard,) = judge.candidates([f"wildguard={tmp_path / 'model'}"], given)
    results = run(guard, **options)
    assert cells(results, "wildguard")["expguardtest_prompt"]["errors"] == 3
    assert len(asked) >= 12
    asked.clear()
    assert run(guard, **options)["cells"] == results["cells"]
    (again,) = asked
    assert "bad cow" in again


# --- one table --------------------------------------------------------------------------------------------------------


def test_what_differs_costs_one_table(run, tmp_path):
    fitted = {"value": 0.5, "how": "max F1", "on": "own"}
    one = candidate(thresholds={"flagged": fitted})
    other = candidate("other", thresholds={"flagged": fitted | {"how": "max recall"}})
    run(one, other)
    text = shared.table(tmp_path)
    assert "## F1 at the guard's own decision" in text
    assert "## F1 at the threshold" not in text
    assert "## No table\n\n- expguardtest_prompt, F1 at the threshold" in text
    assert "f1_at_validation" not in (tmp_path / "out/results.csv").read_text()


def test_no_new_results_beside_an_old_table(run, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError

    monkeypatch.setattr(evaluate, "csv_text", broken)
    with pytest.raises(ValueError):
        run(candidate())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["runs"]


class Mute(shared.KeywordGuard):
    """Judges answers alone."""

    name, judges = "mute", ("response_unsafe",)


def test_a_guard_that_judges_nothing_of_what_was_asked(arguments, tmp_path, monkeypatch):
    """A table says so, and the exit code."""
    mute = judge.Candidate("mute", "mute", "1", Mute)
    monkeypatch.setattr(evaluate, "parse_args", lambda *_: [arguments(task_type="prompt")])
    monkeypatch.setattr(evaluate, "candidates", lambda *_: [mute])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 1
    assert "| mute | not supported |" in shared.table(tmp_path)


def test_files_of_other_runs_are_read_one_after_another(arguments, run, tmp_path):
    """No guard takes the place of another, nothing is judged before that is known, and our columns
    stand first.
    """
    prompts, responses = arguments().benchmarks
    for name, spec in {"a": responses, "b": prompts}.items():
        run(candidate("same"), benchmarks=[spec], output_dir=str(tmp_path / name))
    first = str(tmp_path / "a/results.json")
    second = str(tmp_path / "b/results.json")
    late = candidate("late")
    with user_error(r"b.results\.json: holds same too"):
        run(late, add_results=[first, second], benchmarks=[prompts])
    assert not late.load.made
    results = run(late, add_results=[first], benchmarks=[prompts])
    assert list(results["benchmarks"]) == ["expguardtest_prompt", "expguardtest_response"]
    assert list(cells(results, "late")) == ["expguardtest_prompt"]
    assert list(cells(results, "same")) == ["expguardtest_response"]
