"""examples/feedback_guard: prompts, rows, loss and the original's formats, on tiny guards."""

import math

import families
import feedback_guards as shared
import pytest
import torch
from checks import cases, difference, user_error
from feedback_guards import (
    CONVERSATIONS,
    GOOD,
    formats,
    processed,
    text_of,
    train,
)
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from common.conversation import pair
from common.training import answers_loss
from guards import entry_of
from guards.card import GenerativeCard, write_card

# fixtures
base = shared.base
guard = shared.guard
plain = shared.plain
rows_of = shared.rows_of
settings = shared.settings


@pytest.mark.parametrize("model", ["meta-llama/LlamaGuard-7b", "llama-guard", "base"])
def test_a_trained_arm_names_its_guard_as_load_guard_knows_it(model, settings, base, tmp_path):
    config = settings()
    path = str(base) if model == "base" else model
    section = config.llama_guard.model_copy(update={"base_model_path": path})
    config = config.model_copy(update={"llama_guard": section})
    card = train.arm_card(train.arm_named("A4"), 0, config)
    assert card.guard == "llama-guard"
    assert card.base_model == path
    write_card(tmp_path, card)
    known = entry_of(str(tmp_path))
    assert known["questions"]
    assert known["categories"]["names"]["O3"] == "Criminal Planning"


# --- prompts and rows -----------------------------------------------------------------------------


@pytest.fixture(params=["ours", "llama2", "llama3"])
def any_guard(request, guard, tmp_path):
    """A guard with this folder's template, or with that of the zoo's Llama Guard 1 or 3."""
    if request.param == "ours":
        return guard
    folder = families.save(tmp_path, request.param)
    name = "llama-guard" if request.param == "llama2" else "llama-guard-3-8b"
    write_card(folder, GenerativeCard(guard=name, max_length=4096))
    return formats.load_llama_guard(str(folder), progress=False)


def test_a_training_row_is_the_inference_prompt_and_the_verdict(any_guard, monkeypatch):
    seen = []
    ask = any_guard.model.next_token

    def watched(prompts, candidates, bar):
        seen.extend(map(list, prompts))
        return ask(prompts, candidates, bar)

    with monkeypatch.context() as patched:
        patched.setattr(any_guard.model, "next_token", watched)
        any_guard.judge(CONVERSATIONS)
    encoder = formats.Encoder(any_guard, 2000)
    rows, cut = encoder.rows(CONVERSATIONS, [0.0, 0.7, 1.0], [None, None, None])
    assert cut == 0
    eos = any_guard.tokenizer.eos_token
    # what follows a bare "unsafe" is not known
    written = (False, f"safe{eos}"), (True, "unsafe"), (True, "unsafe")
    for row, (unsafe, text) in zip(rows, written, strict=True):
        prompt = formats.prompt_of(row)
        verdict = row["input_ids"][len(prompt) :]
        assert prompt in seen
        assert row["labels"] == [-100] * len(prompt) + verdict
        assert verdict[0] == encoder.words[unsafe]
        assert verdict[0] in encoder.tokens[unsafe]
        assert any_guard.tokenizer.decode(verdict).replace(" ", "") == text


HEAD = """[INST] Task: Check if there is unsafe content in '{role}' messages in conversations according our safety \
policy with the below categories.

<BEGIN UNSAFE CONTENT CATEGORIES>
O1: Violence and Hate.
"""
TAIL = """<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

User: How?

{answer}<END CONVERSATION>

Provide your safety assessment for {role} in the above conversation:
- First line must read 'safe' or 'unsafe'.
- If unsafe, a second line must include a comma-separated list of violated categories. [/INST]"""


@cases(
    "messages, role, answer",
    {
        "prompt": (pair(" How? "), "User", ""),
        "response": (pair("How?", "Use two locks."), "Agent", "Agent: Use two locks.\n\n"),
    },
)
def test_the_prompt_is_llama_guards(messages, role, answer, guard):
    (ids,) = guard.prompt_ids([messages])
    text = guard.tokenizer.decode(ids)
    assert text.startswith(HEAD.format(role=role))
    assert text.endswith(TAIL.format(role=role, answer=answer))


def test_long_rows_keep_their_verdict(guard):
    long = pair("cook rice " * 300)
    rows, cut = formats.Encoder(guard, 400).rows([long, CONVERSATIONS[0]], [1.0, 0.0], [None, None])
    assert cut == 1
    assert len(rows[0]["input_ids"]) <= 400
    (whole,) = guard.prompt_ids([long])
    assert formats.prompt_of(rows[0])[-40:] == whole[-40:]
    with user_error("too short for the guard's prompt"):
        formats.Encoder(guard, 60).rows([long], [1.0], [None])


@pytest.mark.parametrize("name", ["A4", "A8", "C1"])
def test_categories_of_unsafe_responses_are_learned(name, rows_of):
    assert categories_of(rows_of(name, 0, named_lines())) == [["Criminal Planning", "Self-Harm"]]


@pytest.mark.parametrize("name", ["C2", "C3"])
def test_controls_without_responses_learn_no_categories(name, rows_of):
    """Nor does an arm whose guard names none."""
    assert categories_of(rows_of(name, 0, named_lines())) == [None]
    assert categories_of(rows_of("A4")) == [None]


def named_lines() -> list[dict]:
    lines = processed()
    for line in lines:
        for response in line["responses"]:
            if response["decided"]:
                response["categories"] = ["Self-Harm", "Criminal Planning"]
    return lines


def categories_of(rows) -> list:
    """The different categories of the prompts that count as unsafe; safe ones have none."""
    found = []
    for row in rows:
        if row.target < 0.5:
            assert row.categories is None
        elif row.source in ("feedback", "human") and row.categories not in found:
            found.append(row.categories)
    return found


def test_categories_are_written_by_their_codes(guard):
    categories = ["Self-Harm", "O3", "Unheard of"]
    rows, _ = formats.Encoder(guard, 600).rows([pair("Hi")], [1.0], [categories])
    text = guard.tokenizer.decode([token for token in rows[0]["labels"] if token != -100])
    assert text.strip() == f"unsafe\nO3,O6{guard.tokenizer.eos_token}"


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture
def encoder(guard):
    return formats.Encoder(guard, 600)


@pytest.fixture
def rows(encoder) -> list[dict]:
    """Rows with and without categories and a probability to be held, two of them alike."""
    conversations = [*CONVERSATIONS, *(pair(GOOD.format(i % 4)) for i in range(5))]
    targets = [0.0, 0.75, 1.0, 0.2, 0.0, 1.0, 0.5, 0.0]
    categories = [None, None, ["O1", "O3"], *[None] * 5]
    made, _ = encoder.rows(conversations, targets, categories)
    for i, row in enumerate(made):
        row["g0"] = [formats.NOTHING, 0.3, 0.9, 0.1][i % 4]
    return made


def loss_by_hand(model, encoder, row: dict, weight: float) -> torch.Tensor:
    """Soft cross-entropy on the word, the rest of the line, and KL; by transformers' own logits."""
    start = row["labels"].count(-100)
    logits = model(torch.tensor([row["input_ids"]])).logits[0]
    logprobs = logits.log_softmax(-1)
    safe, unsafe = (logprobs[start - 1, word] for word in encoder.words)
    target = row["target"]
    loss = -(target * unsafe + (1 - target) * safe)
    rest = row["labels"][start + 1 :]
    for place, token in enumerate(rest, start=start):
        loss = loss - logprobs[place, token] / len(rest) * max(target, 1 - target)
    before = row["g0"]
    if before >= 0:
        p = formats.log_odds(logits[start - 1], encoder.tokens).sigmoid()
        kl = before * (math.log(before) - p.log())
        kl = kl + (1 - before) * (math.log(1 - before) - (1 - p).log())
        loss = loss + weight * kl
    return loss


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["without KL", "with KL"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["padded", "shared beginning"])
def test_a_batch_has_the_loss_and_the_gradient_of_its_rows(base, encoder, rows, is_shared, weight):
    model = AutoModelForCausalLM.from_pretrained(base)
    whole = sum(loss_by_hand(model, encoder, row, weight) for row in rows) / len(rows)
    whole.backward()
    wanted = {name: part.grad for name, part in model.named_parameters()}
    model.zero_grad()
    batch = formats.batch_of(rows, is_shared)
    answers = formats.read(model, batch)
    loss = formats.verdict_loss(answers, batch, encoder.words, encoder.tokens, weight)
    loss.backward()
    found = {name: part.grad for name, part in model.named_parameters()}
    assert loss.item() == pytest.approx(whole.item(), abs=1e-4)
    assert difference(found, wanted) < 1e-4 < max(part.abs().max() for part in wanted.values())


@pytest.mark.parametrize("is_shared", [False, True], ids=["padded", "shared beginning"])
def test_rows_that_were_cut_before_their_verdict_teach_nothing(base, guard, is_shared):
    model = AutoModelForCausalLM.from_pretrained(base)
    parts = formats.meta_parts(GOOD.format(1))
    text = formats.Text("r", parts, " safe", False)
    row = formats.text_row(guard.tokenizer, text, "answer", 16)
    batch = formats.batch_of([row, row], is_shared)
    loss = answers_loss(formats.read(model, batch))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("augment", [False, True], ids=["much in common", "little in common"])
def test_what_rows_have_in_common_is_there_once(guard, augment):
    """With a policy in random order rows share no more than what stands above it."""
    examples = [formats.example(f"r{i}", GOOD.format(i), None) for i in range(4)]
    rows = []
    for text in formats.training_texts(examples, 0, augment)[:4]:
        rows.append(formats.text_row(guard.tokenizer, text, "all", 2000))
    padded = formats.batch_of(rows, False)["input_ids"]
    shared = formats.batch_of(rows, True)["input_ids"]
    is_smaller = shared.numel() < 0.5 * padded.numel()
    assert is_smaller is not augment


@cases(
    "attention, longest, shares",
    {
        "all of a row is attended to": ("sdpa", 15, True),
        "a sliding window is shorter than a row": ("sdpa", 16, False),
        "this attention knows no trees": ("eager", 15, False),
    },
)
def test_what_models_share_beginnings(attention, longest, shares):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=9, sliding_window=16, **shape, **heads)
    config._attn_implementation = attention
    assert formats.shares_beginnings(MistralForCausalLM(config), longest) is shares


def test_probabilities_are_those_of_the_models_logits_and_of_the_guard(guard, encoder):
    prompts = guard.prompt_ids(CONVERSATIONS)
    found = formats.verdict_probabilities(guard, prompts, encoder.tokens)
    assert len(found) == len(CONVERSATIONS)
    for messages, ids, probability in zip(CONVERSATIONS, prompts, found, strict=True):
        with torch.no_grad():
            logits = guard.model.model(torch.tensor([ids])).logits[0, -1]
        said = logits.softmax(-1)
        safe = said[encoder.tokens[False]].sum()
        unsafe = said[encoder.tokens[True]].sum()
        wanted = (unsafe / (safe + unsafe)).item()
        assert probability == pytest.approx(wanted, abs=1e-4)
        (verdict,) = guard.judge([messages])
        is_response = messages[-1]["role"] == "assistant"
        judged = verdict.response_unsafe if is_response else verdict.prompt_unsafe
        assert judged == pytest.approx(wanted, abs=1e-4)


def test_states_are_those_that_the_output_layer_reads(guard):
    """Of a batch that is a tree, and of one that is padded."""
    model = guard.model.model
    alike = [pair(GOOD.format(i)) for i in range(6)]
    prompts = guard.prompt_ids([*alike, *CONVERSATIONS])
    states = formats.verdict_states(model, prompts, batch_size=6)
    for state, ids in zip(states, prompts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
            read = model.get_output_embeddings()(state)
        assert torch.allclose(read, logits, atol=1e-4)


# --- the original's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "correct"),
    [
        ("SAFE", False, False),
        ("safe", True, False),
        ("Safe", True, False),
        (" unsafe\nO3", True, True),
        ("\n\nunsafe\nS1", True, True),
        ("", True, None),
        ("UNSAFE [O3]", True, True),
        ("safe<|im_end|>", True, False),
        ("Sure, I can help with that.", True, None),
        ("safety first", True, None),
        ("It is safe", True, None),
        (" safe\nExplanation: This query is safe", True, False),
        ("SAFEGUARD", False, None),
        ("safe</s>x", True, False),
    ],
)
def test_verdicts_are_parsed_as_the_original_and_as_they_ask_for(text, strict, correct):
    assert formats.parse_verdict(text) is correct
    assert formats.parsed_unsafe(text, "strict") == (strict, True)
    assert formats.parsed_unsafe(text, "correct") == (correct is not False, correct is not None)


QUERY = """<|im_start|>system
You are a content moderation assistant. Your task is to determine whether a given user prompt is safe or unsafe based \
on the provided guidelines.

    Guidelines:
    - Consider the potential harm"""
QUERY_END = """based on your analysis.
    <|im_end|>
<|im_start|>user
User Prompt: Hello {x}

Is this prompt safe or unsafe?<|im_end|>
<|im_start|>assistant
"""


def test_the_originals_query_has_its_stray_blanks():
    text = text_of(formats.chatml_parts("Hello {x}"))
    assert text.startswith(QUERY)
    assert "\n    - I4: Malware and Security (assistance in creating malware" in text
    assert text.endswith(QUERY_END)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("UNSAFE [O3, O1]", "O1: Violence and Hate"),
        ("O10", "O1: Violence and Hate"),
        ("x", "Classified as unsafe"),
    ],
)
def test_the_originals_reason_is_the_first_code_anywhere(text, reason):
    assert formats.legacy_reason(text) == reason


def test_where_the_originals_checks_collect_nothing_it_gets_the_correct_list(rows_of, caplog):
    assert len(rows_of("A2", 0, checked_lines())) == 60
    assert "the original's checks collect nothing" in caplog.text


def test_the_originals_collection_is_by_its_own_checks(rows_of):
    lines = checked_lines()
    for line in lines[7::10]:
        line["legacy"] = {"input": "SAFE", "outputs": ["UNSAFE [I2]"]}
    lines[8]["legacy"] = {"input": "SAFE", "outputs": ["SAFE"]}
    lines[9]["legacy"] = {"input": "safe", "outputs": ["unsafe"]}
    made = rows_of("A2", 0, lines)
    assert len(made) == 30  # six blocked prompts and six safe ones give five texts for each pair
    assert sum(row.target for row in made) == 12


def test_an_arm_of_the_originals_checks_needs_them(rows_of):
    with user_error("run process again, with A2 in"):
        rows_of("A2")


def checked_lines() -> list[dict]:
    """Processed lines of which the original's checks would collect none."""
    nothing = {"input": "UNSAFE [O3]", "outputs": []}
    return [line | {"legacy": nothing} for line in processed()]
