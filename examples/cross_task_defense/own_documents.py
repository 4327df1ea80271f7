"""Documents of your own as build_data.py takes them: split, each with a refusal or with answers.

python own_documents.py --harmful harmful.jsonl --plain news.jsonl,mails.jsonl --useful sensitive.jsonl \
    --output_path documents.jsonl
python build_data.py --documents documents.jsonl --tasks summarize --n_defence 100 \
    --counter_examples 200 --strip_cues --output_dir data

A row of a file has `text` and, if rows belong together, `group`: what asks for the same thing, say,
or stems from the same prompt. Rows of a group, and near-copies, never stand on both sides of the
split, and of a group one alone is tested. Plain documents are everyday ones, useful ones sensitive
but harmless.
"""

import random
import re
from collections import Counter, defaultdict
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
from common.engines import Decoding, load_engine
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
        refusals: a file of refusals; each harmful document to train on gets one, whatever it is
            about.
        words: so many words of each document are kept, counted after an opening line such as
            "Sure, here's …:", which is left out. 80 words and a task are about 170 tokens.
        n_train: documents of each kind to train on, at most.
        n_test: documents of each kind to test on.
        base_model: answers the harmless documents to train on, so that counter examples keep what
            it says. An answer that is cut off ends with its last whole sentence.
        prompt_template: how it is asked.
        tasks: which of its answers are wanted.
        max_new_tokens: of an answer.
        seed: of the split and of what is dealt.
    """
    if Path(output_path).exists():
        raise UserError(f"--output_path {output_path}: is there already; name another file")
    check_choice(words, n_train, n_test, tasks)
    for flag, files in (("harmful", harmful), ("plain", plain)):
        if not files:
            raise UserError(f"--{flag}: names no file")
    order = random.Random(seed)
    no = [document.text for document in read_texts([refusals], "refusals")]
    documents = read_texts(harmful, "malicious")
    documents += read_texts(useful, "useful")
    documents += read_texts(plain, "plain")
    for document in documents:
        document.text = first_words(without_cues(document.text), words)
    documents = split(documents, n_train, n_test, order)
    for document in documents:
        if document.kind == "malicious" and document.split == "train":
            document.refusals = [order.choice(no)]
    benign = [document for document in documents if document.is_benign_to_train]
    if tasks:
        add_answers(benign, base_model, prompt_template, tasks, max_new_tokens)
    write_text(Path(output_path), json_lines(map(asdict, documents)))
    sizes = Counter(f"{document.kind} to {document.split}" for document in documents)
    print(f"{output_path}: {', '.join(f'{size} {what}' for what, size in sizes.items())}")


def check_choice(words: int, n_train: int, n_test: int, tasks: list[str]) -> None:
    if min(words, n_train, n_test) < 1:
        raise UserError("--words, --n_train, --n_test: expected 1 or more")
    for task in tasks:
        if task not in ANSWERED:
            raise UserError(f"--tasks {task}: expected some of {', '.join(ANSWERED)}")


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
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}, field text: expected text, found {text!r:.60}")
            found.append(Document(kind, text, row.get("group")))
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
    documents: list[Document], n_train: int, n_test: int, order: random.Random
) -> list[Document]:
    """The documents to train and to test on.

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
    for own in by_kind.values():
        left = [document for document in own if document.group not in tested]
        train += left[:n_train]
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
    max_new_tokens: int,
) -> None:
    """What the base model says of documents. A refusal, or nothing, is no answer."""
    template = load_template(prompt_template)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(base_model))
    engine = load_engine("transformers", base_model, tokenizer)
    decoding = Decoding(max_new_tokens)
    for task in tasks:
        asked = [(task_instruction(task, document.text), None) for document in documents]
        prompts = encode_prompts(template, tokenizer, asked)
        said = engine.completions(prompts, decoding)
        left_out = 0
        for document, completion in zip(documents, said, strict=True):
            answer = whole_sentences(completion.text)
            if answer and not classify(answer).is_refusal:
                document.answers[task] = answer
            else:
                left_out += 1
        print(f"{task}: {len(said) - left_out} answers of {base_model}, {left_out} left out")


def whole_sentences(text: str) -> str:
    """A text without the sentence that breaks off; a single one is kept as it is."""
    ended = re.match(r"(?s).*[.!?。！？]", text)
    kept = ended[0] if ended else text
    return kept.strip()


if __name__ == "__main__":
    run(own_documents)
