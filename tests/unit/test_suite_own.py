"""Own labelled rows as benchmarks of the suite, under their own name."""

import pytest
from checks import read_rows, user_error, write_rows
from test_suite_evaluate import arguments, asked_of, candidate, cells, file, run, table

from guards.suite.own import own_benchmarks

_ = arguments, file, run  # fixtures


def row(prompt, unsafe, response=None, response_label=None, **more):
    """A row in the plain format."""
    labels = {"prompt_label": unsafe, "response_label": response_label}
    return {"prompt": prompt, "response": response, **labels, **more}


@pytest.fixture
def own(tmp_path):
    """Prompts and answers: 3 of 5 prompts are unsafe, and 1 of 3 answers."""
    rows = [
        row("bad cat", "unsafe", "bad hen", "unsafe", id="one"),
        row("bad dog", "unsafe", "nice hen", "safe", id="two"),
        row("maybe fox", "unsafe", id="three"),
        row("nice cat", "safe", "bad cow", "safe", id="four"),
        row("broken owl", "safe", id="five"),
    ]
    return write_rows(tmp_path / "mine.jsonl", rows)


def test_prompts_and_answers_of_one_file(run, own, tmp_path):
    given = {"benchmarks": [str(own)], "bootstrap_rounds": 20}
    results = run(candidate(known="expguard"), **given)
    found = cells(results)
    assert list(found) == ["mine_prompt", "mine_response"]
    assert (found["mine_prompt"]["rows"], found["mine_prompt"]["positives"]) == (5, 3)
    # found: cat, dog; missed: fox; no verdict on a safe one counts as wrong: owl
    assert found["mine_prompt"]["f1"] == pytest.approx(4 / 6)
    assert (found["mine_response"]["rows"], found["mine_response"]["f1"]) == (3, 2 / 3)
    facts = results["benchmarks"]["mine_prompt"]
    assert facts["file"] == "mine.jsonl"
    assert not facts["complete"]
    text = table(tmp_path)
    assert "| keyword | 0.667 | 0.667 |" in text
    assert "Published numbers are left out" not in text  # nobody published any of these rows
    assert "mine_response" in (tmp_path / "out/results.html").read_text()
    said = read_rows(tmp_path / "out/predictions.jsonl")
    assert [line["index"] for line in said if line["benchmark"] == "mine_response"] == [0, 1, 3]
    again = candidate(known="expguard")
    assert run(again, **given)["cells"] == results["cells"]
    assert not again.load.made


def test_one_label_needs_no_ending(run, tmp_path):
    lines = ["prompt,label,language", "bad cat,1,en", "nice cat,0,de", "nice dog,0,de"]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    results = run(candidate(), benchmarks=[str(path), f"few={path}[:2]", f"{path}[1:]"])
    assert {name: cell["rows"] for name, cell in cells(results).items()} == {
        "mine": 3,
        "few": 2,
        "mine-1": 2,
    }
    text = table(tmp_path)
    assert "| keyword | mine | de | 2 | 0 | – |" in text
    part = run(candidate(), benchmarks=[str(path)], max_rows=2)
    assert cells(part)["mine"]["rows"] == 2


def test_language_domain_and_categories_are_sub_groups(run, tmp_path):
    lines = ["prompt,label,language,domain,category", "bad cat,1,en,law,theft"]
    lines += ["nice cat,0,de,law,", "nice dog,0,de,,"]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    cell = cells(run(candidate(), benchmarks=[f"{path}[0:2]", f"all={path}"]))
    groups = cell["all"]["groups"]
    assert {name: list(parts) for name, parts in groups.items()} == {
        "language": ["de", "en"],
        "domain": ["law"],
        "categories": ["theft"],
    }
    assert groups["domain"]["law"]["rows"] == 2
    assert list(cell["mine-0-2"]["groups"]["domain"]) == ["law"]


def test_bundled_rows_by_their_spec(run):
    """The spec of a data set, with a split and a slice."""
    spec = "beavertails-sample:test[:6]"
    (made,) = own_benchmarks(spec)
    assert made.name == "beavertails-sample-test-6"
    assert made.label == "response_unsafe"
    assert len(made.rows) == 6
    assert {row["groups"]["categories"] for row in made.rows if row["label"]}
    one = candidate()
    found = cells(run(one, benchmarks=[spec]))
    assert found[made.name]["rows"] == 6
    assert len(asked_of(one)) == 6


def test_only_the_asked_task(run, own):
    one = candidate()
    results = run(one, benchmarks=[str(own)], task_type="response")
    assert list(cells(results)) == ["mine_response"]
    assert one.load.made[0].labels == {"response_unsafe"}


def test_turns_before_the_judged_one_are_kept(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "bad cat"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    line = {"messages": messages, "prompt_unsafe": True, "response_unsafe": False}
    prompts, answers = own_benchmarks(str(write_rows(tmp_path / "rows.jsonl", [line])))
    assert [turn["content"] for turn in prompts.rows[0]["messages"]] == ["Hi", "Hello", "bad cat"]
    assert [turn["content"] for turn in answers.rows[0]["messages"]] == [t for _, t in turns]


REFUSED = {
    "no label": ("rows.jsonl", [{"prompt": "Hi"}], "no row has a label"),
    "a wrong label": (
        "rows.jsonl",
        [row("Hi", "dubious")],
        r"rows\.jsonl, line 1, field prompt_label: unknown label 'dubious'",
    ),
    "a name of ours": ("beavertails.jsonl", [row("Hi", "safe")], r"write beavertails@FILE; else"),
    "no rows": ("rows.jsonl", [], r"rows\.jsonl: the file is empty"),
}


@pytest.mark.parametrize(("name", "rows", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_rows(run, tmp_path, name, rows, said):
    one = candidate()
    path = write_rows(tmp_path / name, rows)
    with user_error(said):
        run(one, benchmarks=[str(path)])
    assert not one.load.made


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no.jsonl", r"no\.jsonl: no such file"),
        ("toxicchatt", r"no benchmark 'toxicchatt'; near it: .*rows of your own are a file"),
        ("toxicchatt@rows.jsonl", "no benchmark 'toxicchatt'"),
        ("mine/too=rows.jsonl", "no such file"),
    ],
)
def test_refused_specs(run, spec, said):
    with user_error(said):
        run(candidate(), benchmarks=[spec])


def test_two_files_of_one_name(run, own, tmp_path):
    other = write_rows(tmp_path / "other/mine.jsonl", read_rows(own))
    specs = [str(own), str(other)]
    with user_error("mine_prompt stands there twice; another name: mine=FILE"):
        run(candidate(), benchmarks=specs)
    specs[1] = f"theirs={specs[1]}"
    results = run(candidate(), benchmarks=specs)
    assert "theirs_response" in cells(results)
