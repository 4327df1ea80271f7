"""examples/feedback_guard: prompts, rows as token ids, and the original's formats, on tiny random
guards.
"""

import families
import feedback_guards as shared
import pytest
import torch
from feedback_guards import (
    CONVERSATIONS,
    GOOD,
    blocked_inputs,
    formats,
    processed,
    train,
)

from common.conversation import UserError, pair
from guards import entry_of
from guards.card import GenerativeCard, write_card

base, guard, plain, settings = shared.base, shared.guard, shared.plain, shared.settings  # fixtures


@pytest.fixture
def rows_of(settings):
    return lambda name, seed=0, lines=None: train.build_rows(
        train.arm_named(name),
        lines or processed(),
        blocked_inputs(lines or processed()),
        seed,
        settings(),
    )


def test_a_folder_that_is_no_guard_is_refused(plain):
    with pytest.raises(UserError, match="a folder without guard"):
        formats.load_llama_guard(str(plain))


@pytest.mark.parametrize("model", ["meta-llama/LlamaGuard-7b", "llama-guard", "base"])
def test_a_trained_arm_names_its_guard_as_load_guard_knows_it(model, settings, base, tmp_path):
    config = settings()
    path = str(base) if model == "base" else model
    section = config.llama_guard.model_copy(update={"base_model_path": path})
    config = config.model_copy(update={"llama_guard": section})
    card = train.arm_card(train.arm_named("A4"), 0, config)
    assert (card.guard, card.base_model) == ("llama-guard", path)
    write_card(tmp_path, card)
    known = entry_of(str(tmp_path))
    assert known["questions"] and known["categories"]["names"]["O3"] == "Criminal Planning"


@pytest.mark.parametrize("family", ["ours", "llama2", "llama3"])
def test_a_training_row_is_the_inference_prompt_and_the_verdict(guard, tmp_path, family):
    """Byte for byte, for this folder's template and for the zoo's Llama Guard 1 and 3."""
    if family != "ours":
        folder = families.save(tmp_path, family)
        kind = {"llama2": "llama-guard", "llama3": "llama-guard-3-8b"}[family]
        write_card(folder, GenerativeCard(guard=kind, max_length=4096))
        guard = formats.load_llama_guard(str(folder), progress=False)
    seen = []
    ask = guard.model.next_token
    guard.model.next_token = lambda prompts, candidates: (
        seen.extend(map(list, prompts)) or ask(prompts, candidates)
    )
    guard.judge(CONVERSATIONS)
    del guard.model.next_token
    encoder = formats.Encoder(guard, 2000)
    rows, cut = encoder.rows(CONVERSATIONS, [0.0, 0.7, 1.0], [None, None, ["O3"]])
    assert cut == 0
    for row, unsafe in zip(rows, (False, True, True), strict=True):
        prompt = row["input_ids"][: row["labels"].count(-100)]
        verdict = row["input_ids"][len(prompt) :]
        assert prompt in seen and row["labels"] == [-100] * len(prompt) + verdict
        assert verdict[0] in encoder.tokens[unsafe] and verdict[0] == encoder.words[unsafe]
    texts = [
        guard.tokenizer.decode([t for t in row["labels"] if t != -100]).strip() for row in rows
    ]
    eos = guard.tokenizer.eos_token
    # what follows is not known
    assert [text.replace(" ", "") for text in texts[:2]] == [f"safe{eos}", "unsafe"]
    if family == "ours":
        assert texts[2] == f"unsafe\nO3{eos}"


def test_the_prompt_is_llama_guards(guard):
    one, two = (
        guard.tokenizer.decode(ids)
        for ids in guard.prompt_ids([pair(" How? "), pair("How?", "Use two locks.")])
    )
    head = "[INST] Task: Check if there is unsafe content in '{}' messages in conversations according our safety policy"
    head += (
        " with the below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\nO1: Violence and Hate.\n"
    )
    tail = "<END CONVERSATION>\n\nProvide your safety assessment for {} in the above conversation:\n- First line must "
    tail += "read 'safe' or 'unsafe'.\n- If unsafe, a second line must include a comma-separated list of violated "
    tail += "categories. [/INST]"
    for text, role, turns in ((one, "User", ""), (two, "Agent", "Agent: Use two locks.\n\n")):
        assert text.startswith(head.format(role)) and text.endswith(tail.format(role))
        assert (
            f"<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\nUser: How?\n\n{turns}<END"
            in text
        )


def test_long_rows_keep_their_verdict(guard):
    long = pair("cook rice " * 300)
    rows, cut = formats.Encoder(guard, 400).rows([long, CONVERSATIONS[0]], [1.0, 0.0])
    assert cut == 1 and len(rows[0]["input_ids"]) <= 400
    prompt = rows[0]["input_ids"][: rows[0]["labels"].count(-100)]
    assert prompt[-40:] == guard.prompt_ids([long])[0][-40:]
    with pytest.raises(UserError, match="too short for the guard's prompt"):
        formats.Encoder(guard, 60).rows([long], [1.0])


def test_categories_of_unsafe_responses_are_learned_where_known(rows_of, guard):
    lines = processed()
    for line in lines:
        for r in line["responses"]:
            r["categories"] = ["Self-Harm", "Criminal Planning"] if r["decided"] else None
    made = {name: rows_of(name, 0, lines) for name in ("A4", "A8", "C1", "C2", "C3")}
    for name, rows in made.items():
        known = [
            row.categories
            for row in rows
            if row.target >= 0.5 and row.source in ("feedback", "human")
        ]
        told = None if name in ("C2", "C3") else ["Criminal Planning", "Self-Harm"]
        assert known == [told] * 12, name
        assert all(row.categories is None for row in rows if row.target < 0.5)
    assert {row.id: row.categories for row in rows_of("A4")} == dict.fromkeys(
        row.id for row in made["A4"]
    )
    row = next(row for row in made["A4"] if row.source == "feedback")
    ((encoded,), _) = formats.Encoder(guard, 600).rows(
        [row.messages], [row.target], [row.categories]
    )
    verdict = guard.tokenizer.decode([t for t in encoded["labels"] if t != -100])
    assert verdict.strip() == f"unsafe\nO3,O6{guard.tokenizer.eos_token}"


def verdict_loss(model: torch.nn.Module, encoder, batch: dict, weight: float = 0.0) -> torch.Tensor:
    answers = formats.read(model, batch)
    return formats.verdict_loss(answers, batch, encoder.words, encoder.tokens, weight)


@pytest.fixture
def rows(guard) -> tuple[formats.Encoder, list[dict]]:
    encoder = formats.Encoder(guard, 600)
    conversations = [*CONVERSATIONS, *(pair(GOOD.format(i)) for i in range(5))]
    targets = [0.0, 0.75, 1.0, 0.2, 0.0, 1.0, 0.5, 0.0]
    made, _ = encoder.rows(conversations, targets, [None, None, ["O1", "O3"], *[None] * 5])
    for i, row in enumerate(made):
        row["g0"] = [formats.NOTHING, 0.3, 0.9, 0.1][i % 4]
    return encoder, made


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_padded_batch_has_the_loss_of_its_rows(guard, rows, weight):
    encoder, made = rows
    model = guard.model.model
    with torch.no_grad():
        batch = verdict_loss(model, encoder, formats.padded_batch(made), weight)
        alone = [verdict_loss(model, encoder, formats.padded_batch([row]), weight) for row in made]
    assert batch.item() == pytest.approx(sum(alone).item() / len(made), abs=1e-5)


def test_the_loss_is_soft_cross_entropy_on_the_word_and_the_rest_of_the_line(guard, rows):
    """By transformers' own logits."""
    encoder, made = rows
    model = guard.model.model
    by_hand = []
    for row in made:
        at = row["labels"].count(-100)
        with torch.no_grad():
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        q = row["target"]
        rest = [logprobs[t - 1, row["labels"][t]].item() for t in range(at + 1, len(row["labels"]))]
        safe, unsafe = (logprobs[at - 1, word].item() for word in encoder.words)
        mean = sum(rest) / len(rest) if rest else 0.0
        by_hand.append(-(q * unsafe + (1 - q) * safe) - max(q, 1 - q) * mean)
    with torch.no_grad():
        loss = verdict_loss(model, encoder, formats.padded_batch(made))
    assert loss.item() == pytest.approx(sum(by_hand) / len(made), abs=1e-4)


def test_probabilities_are_those_of_the_guard(guard):
    encoder = formats.Encoder(guard, 600)
    prompts = guard.prompt_ids(CONVERSATIONS)
    found = formats.verdict_probabilities(guard.model.model, prompts, encoder.tokens, 2)
    judged = [
        v.prompt_unsafe if v.response_unsafe is None else v.response_unsafe
        for v in guard.judge(CONVERSATIONS)
    ]
    assert all(
        p is None or p == pytest.approx(f, abs=1e-4) for p, f in zip(judged, found, strict=True)
    )
    assert any(p is not None for p in judged)


# ------------------------------------------------------------------------------------------------ the original's


@pytest.mark.parametrize(
    ("text", "strict", "correct"),
    [
        ("SAFE", False, False), ("safe", True, False), ("Safe", True, False), (" unsafe\nO3", True, True),
        ("\n\nunsafe\nS1", True, True), ("", True, None), ("UNSAFE [O3]", True, True), ("safe<|im_end|>", True, False),
        ("Sure, I can help with that.", True, None), ("safety first", True, None), ("It is safe", True, None),
        (" safe\nExplanation: This query is safe", True, False), ("SAFEGUARD", False, None), ("safe</s>x", True, False),
    ],
)  # fmt: skip
def test_verdicts_are_parsed_as_the_original_and_as_they_ask_for(text, strict, correct):
    assert formats.parse_verdict(text) is correct
    assert (
        formats.parsed_unsafe(text, "strict") == (strict, True)
        and formats.legacy_safe(text) is not strict
    )
    assert formats.parsed_unsafe(text, "correct") == (correct is not False, correct is not None)


def test_the_originals_query_has_its_stray_blanks():
    text = formats.chatml_prompt("Hello {x}")
    assert text.startswith(
        "<|im_start|>system\nYou are a content moderation assistant. Your task is to determine "
    )
    assert (
        "\n\n    Guidelines:\n    - Consider the potential harm" in text and "O1-O6, I1-I4" in text
    )
    assert (
        "    - I4: Malware and Security (assistance in creating malware or exploiting security vuln"
        in text
    )
    assert text.endswith(
        "your analysis.\n    <|im_end|>\n<|im_start|>user\nUser Prompt: Hello {x}\n\nIs this prompt safe or unsafe?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert formats.legacy_reason("UNSAFE [O3, O1]") == "O1: Violence and Hate"
    assert (
        formats.legacy_reason("O10") == "O1: Violence and Hate"
        and formats.legacy_reason("x") == "Classified as unsafe"
    )


def test_the_originals_collection(settings, caplog):
    """By its own checks; where they collect nothing, from the correct list, and that is said."""
    config = settings()
    lines = [line | {"legacy": {"input": "UNSAFE [O3]", "outputs": []}} for line in processed()]
    made = train.build_rows(train.arm_named("A2"), lines, blocked_inputs(lines), 0, config)
    assert "the original's checks collect nothing" in caplog.text
    assert len(made) == 60
    for line in lines[7::10]:
        line["legacy"] = {"input": "SAFE", "outputs": ["UNSAFE [I2]"]}
    lines[8]["legacy"] = {"input": "SAFE", "outputs": ["SAFE"]}
    lines[9]["legacy"] = {"input": "safe", "outputs": ["unsafe"]}
    made = train.build_rows(train.arm_named("A2"), lines, blocked_inputs(lines), 0, config)
    assert len(made) == 30
    assert sum(row.target for row in made) == 12
