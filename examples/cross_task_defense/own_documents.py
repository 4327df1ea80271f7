"""Documents of your own as build_data.py takes them: split, each with a refusal or with answers.

python own_documents.py --harmful harmful.jsonl --plain news.jsonl,mails.jsonl \
    --useful sensitive.jsonl --n_train 100 --n_train_plain 200 --output_path documents.jsonl
python build_data.py --documents documents.jsonl --tasks summarize --n_defence 100 \
    --counter_examples 200 --strip_cues --output_dir data

A row of a file has `text` and, if rows belong together, `group`: what asks for the same thing, say,
or stems from the same prompt. Rows of a group, and near-copies, are never on both sides of the
split, and of a group one alone is tested. Plain documents are everyday ones, useful ones sensitive
but harmless.

Answers are kept beside the output as they come (documents.partial.jsonl): after a kill the same
command goes on.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from flags import run
from prompts import TASKS, encode_prompts, load_template, task_instruction, without_cues
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import AutoTokenizer

from common import data
from common.bundled import resolve_model
from common.conversation import UserError
from common.engines import Completion, Decoding, load_engine, prompts_at_once
from common.keep import fingerprint, generate
from common.refusal import classify
from common.run import json_lines, write_text

REFUSALS = Path(__file__).parent / "configs/refusals.txt"
ANSWERED = [task for task in TASKS if task != "case"]  # the answer to `case` is the document


@dataclass
class Document:
    """A text, its group, and what documents.jsonl says of it."""

    kind: str
    text: str
    group: str | int | None
    split: str = ""
    refusals: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def is_benign_to_train(self) -> bool:
        return self.kind != "malicious" and self.split == "train"


def own_documents(
    *,
    harmful: list[str],
    plain: list[str],
    useful: list[str] = [],  # noqa: B006 (never changed; fire shows it)
    output_path: str,
    refusals: str = str(REFUSALS),
    words: int = 80,
    n_train: int = 100,
    n_train_harmful: int | None = None,
    n_train_plain: int | None = None,
    n_train_useful: int | None = None,
    n_test: int = 30,
    base_model: str = "smollm2-135m-instruct",
    prompt_template: str = "chat",
    tasks: list[str] = ANSWERED,
    max_new_tokens: int = 48,
    seed: int = 42,
) -> None:
    """Write documents.jsonl from files of texts.

    Args:
        harmful: files of documents that are to be refused.
        plain: files of harmless ones.
        useful: files of harmless ones that are sensitive, or look it.
        output_path: the file to write; one that is there is not overwritten.
        refusals: a file of refusals, of which each harmful document to train on gets one.
        words: so many words of each document are kept, counted after an opening line such as
            "Sure, here's …:", which is left out. 80 words and a task are about 170 tokens.
        n_train: documents of each kind to train on, at most.
        n_train_harmful: of harmful ones, if not n_train.
        n_train_plain: of plain ones, if not n_train.
        n_train_useful: of useful ones, if not n_train.
        n_test: documents of each kind to test on.
        base_model: answers the harmless documents to train on, so that counter examples keep what
            it says. An answer that is cut off ends with its last whole sentence.
        prompt_template: how it is asked.
        tasks: which of its answers are wanted.
        max_new_tokens: of an answer.
        seed: of the split and of what is dealt.
    """
    output = Path(output_path)
    if output.exists():
        raise UserError(f"--output_path {output_path}: is there already; name another file")
    if not harmful or not plain:
        raise UserError(f"--{'plain' if harmful else 'harmful'}: names no file")
    to_train = by_kind(n_train, n_train_harmful, n_train_plain, n_train_useful)
    check_choice(words, [n_test, *to_train.values()], tasks)
    order = random.Random(seed)
    no = read_texts([refusals], "refusals")
    files = {"malicious": harmful, "useful": useful, "plain": plain}
    documents = split(read_documents(files, words), to_train, n_test, order)
    deal_refusals(documents, no, order)
    kept = output.with_suffix(".partial.jsonl")
    if tasks:
        add_answers(documents, base_model, prompt_template, tasks, Decoding(max_new_tokens), kept)
    write_text(output, json_lines(map(asdict, documents)))
    if tasks:
        kept.unlink(missing_ok=True)
    say_sizes(output, documents)


def by_kind(
    count: int,
    harmful: int | None,
    plain: int | None,
    useful: int | None,
) -> dict[str, int]:
    """How many documents of each kind: its own number, or else `count`."""
    counts = {"malicious": harmful, "plain": plain, "useful": useful}
    for kind, own in counts.items():
        counts[kind] = count if own is None else own
    return counts


def deal_refusals(
    documents: list[Document],
    refusals: list[Document],
    order: random.Random,
) -> None:
    """Give each harmful document to train on a refusal."""
    for document in documents:
        if document.kind == "malicious" and document.split == "train":
            document.refusals = [order.choice(refusals).text]


def say_sizes(output: Path, documents: list[Document]) -> None:
    sizes = Counter(f"{document.kind} to {document.split}" for document in documents)
    listed = [f"{size} {what}" for what, size in sizes.items()]
    print(f"{output}: {', '.join(listed)}")


def check_choice(words: int, counts: list[int], tasks: list[str]) -> None:
    """Raise UserError for a number or a task that cannot be."""
    if min(words, *counts) < 1:
        raise UserError("--words, --n_train…, --n_test: expected 1 or more")
    for task in tasks:
        if task not in ANSWERED:
            raise UserError(f"--tasks {task}: expected some of {', '.join(ANSWERED)}")


def read_documents(files: dict[str, list[str]], words: int) -> list[Document]:
    """The beginnings of the texts of each kind's files."""
    documents = []
    for kind, of_kind in files.items():
        documents += read_texts(of_kind, kind)
    for document in documents:
        document.text = first_words(without_cues(document.text), words)
    return documents


def read_texts(files: list[str], kind: str) -> list[Document]:
    """The texts of files, with the groups that their rows name.

    Raises:
        UserError: a file cannot be read or holds nothing, or a row has no text.
    """
    found = []
    for path in files:
        before = len(found)
        for where, row in data.read_rows(path):
            if isinstance(row, UserError):
                raise row
            fields = row if isinstance(row, dict) else {}
            text = fields.get("text")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}, field text: expected text, found {text!r:.60}")
            found.append(Document(kind, text, fields.get("group")))
        if len(found) == before:
            raise UserError(f"{path}: holds no text; expected one a row")
    return found


def first_words(text: str, count: int) -> str:
    """The beginning of a text, white space between its words as it was."""
    spans = list(re.finditer(r"\S+", text))
    last = spans[:count][-1]
    return text[: last.end()]


# --- Split --------------------------------------------------------------------------------------


def split(
    documents: list[Document],
    to_train: dict[str, int],
    n_test: int,
    order: random.Random,
) -> list[Document]:
    """The documents to train and to test on.

    Args:
        to_train: documents of each kind to train on, at most.
        n_test: documents of each kind to test on.

    Raises:
        UserError: a kind has too few groups.
    """
    groups = groups_of(documents)
    for document, group in zip(documents, groups, strict=True):
        document.group = group
    documents = order.sample(documents, len(documents))
    by_kind: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_kind[document.kind].append(document)
    test = []
    for kind, own in by_kind.items():
        test += one_a_group(own, kind, n_test)
    tested = {document.group for document in test}
    train = []
    for kind, own in by_kind.items():
        left = [document for document in own if document.group not in tested]
        train += left[: to_train[kind]]
    for document in test:
        document.split = "test"
    for document in train:
        document.split = "train"
    return train + test


def groups_of(documents: list[Document]) -> list[int]:
    """A number a document: alike for those of a named group, and for near-copies."""
    size = len(documents)
    names = []
    for i, document in enumerate(documents):
        alone = document.group is None
        names.append(f"row {i}" if alone else f"group {document.group}")
    numbers, _ = pd.factorize(pd.Series(names))
    copies = data.near_copies([document.text for document in documents])
    ends = [size + copy for copy in copies]  # names and near-copies are two sides of a graph
    edges = ([1] * size, (numbers, ends))
    graph = coo_array(edges, shape=(2 * size, 2 * size))
    _, parts = connected_components(graph, directed=False)
    return parts[numbers].tolist()


def one_a_group(documents: list[Document], kind: str, count: int) -> list[Document]:
    """`count` documents, each of another group."""
    of_group: dict[int, Document] = {}
    for document in documents:
        of_group.setdefault(document.group, document)
    if len(of_group) <= count:
        raise UserError(
            f"--n_test {count}: the {kind} documents are of only {len(of_group)} groups, "
            "and some are needed to train on"
        )
    return list(of_group.values())[:count]


# --- Answers of the base model ------------------------------------------------------------------


def add_answers(
    documents: list[Document],
    base_model: str,
    prompt_template: str,
    tasks: list[str],
    decoding: Decoding,
    partial: Path,
) -> None:
    """What the base model says of harmless documents to train on. A refusal, or nothing, is no
    answer.

    Args:
        partial: where its answers are kept as they come.
    """
    documents = [document for document in documents if document.is_benign_to_train]
    template = load_template(prompt_template)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    asked = []
    for task in tasks:
        for document in documents:
            instruction = task_instruction(task, document.text)
            asked.append((instruction, None))
    prompts = encode_prompts(template, tokenizer, asked)
    engine = load_engine("transformers", base_model, tokenizer)
    size = prompts_at_once()

    def ask(_: int, batch: Sequence[list[int]]) -> Iterator[tuple[int, Completion]]:
        return engine.complete(batch, decoding)

    salt = [fingerprint(base_model), asdict(decoding), size]
    said = iter(generate(ask, prompts, partial, salt, size=size))
    for task in tasks:
        left_out = 0
        for document in documents:
            answer = whole_sentences(next(said).text)
            if answer and not classify(answer).is_refusal:
                document.answers[task] = answer
            else:
                left_out += 1
        answers = len(documents) - left_out
        print(f"{task}: {answers} answers of {base_model}, {left_out} left out")


def whole_sentences(text: str) -> str:
    """A text without the sentence that breaks off; a single one is kept as it is."""
    ended = re.match(r"(?s).*[.!?。！？]", text)
    kept = ended[0] if ended else text
    return kept.strip()


if __name__ == "__main__":
    run(own_documents)
