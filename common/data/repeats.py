"""Repeats and leaks: rows of one conversation, splits that share no prompt, and how far two sets
overlap.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset
from datasketch import MinHash, MinHashLSH
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit

from common.conversation import FEATURES, LABELS, UserError, judged_label, last_turns


def prompt_key(row: Mapping) -> str:
    """The last user turn, case and spacing apart: groups rows, so that no prompt stands on both
    sides of a split. Of an answer without a prompt it is the answer.
    """
    prompt, response = last_turns(row["messages"])
    if prompt is None:
        prompt = response
    words = (prompt or "").lower().split()
    return " ".join(words)


def deduplicate(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
    """One row a conversation, labels by majority vote.

    BeaverTails-330k holds about 3.3 annotations a pair. A response is unsafe if more than half of
    its annotations say so (as GuardBench does: safe if the mean of is_safe is at least 0.5); a
    category holds if more than half name it, and an unsafe response keeps its most often named ones
    even below half.

    Returns:
        The rows (first occurrence, in order) and a report: rows, unique, conflicting.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        key = json.dumps(row["messages"])
        groups.setdefault(key, []).append(row)
    unique = []
    conflicting = 0
    for group in groups.values():
        voted = dict(group[0])
        voted.update(_majority(group))
        unique.append(voted)
        opinions = {_opinion(row) for row in group}
        if len(opinions) > 1:
            conflicting += 1
    counts = {
        "rows": len(rows),
        "unique": len(unique),
        "conflicting": conflicting,
    }
    return Dataset.from_list(unique, features=FEATURES), counts


def _opinion(row: Mapping) -> str:
    """The labels and categories of a row, to be compared with those of its repeats."""
    categories = row["categories"]
    if categories is not None:
        categories = sorted(categories)
    labels = [row[label] for label in LABELS]
    return json.dumps([labels, categories])


def _majority(group: Sequence[Mapping]) -> dict[str, bool | list[str] | None]:
    """Labels and categories by majority vote. An outvoted row has no say in the categories: a
    response that was voted safe has none, an unsafe one has some. They speak of the last turn.
    """
    judged = judged_label(group[0]["messages"])
    voted = {}
    for label in LABELS:
        said = Counter(row[label] for row in group)
        voted[label] = None
        if said[True] or said[False]:
            voted[label] = said[True] > said[False]
    votes = Counter()
    voted["categories"] = None
    for row in group:
        agrees = row[judged] == voted[judged]
        if agrees and row["categories"] is not None:
            votes.update(row["categories"])
            voted["categories"] = []
    if votes:
        most = max(votes.values())
        bar = min(len(group) / 2, most - 0.5)
        named = [name for name in votes if votes[name] > bar]
        voted["categories"] = sorted(named)
    return voted


def grouped_split(rows: Dataset, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `ratio` of the prompts with all their rows. Raises UserError unless 0 < ratio
    < 1.
    """
    if not 0 < ratio < 1:
        raise UserError(f"--eval_split_ratio {ratio}: must lie strictly between 0 and 1")
    groups = [prompt_key(row) for row in rows]
    prompts = set(groups)
    count = len(prompts)
    if count < 2:
        raise UserError("--eval_split_ratio: fewer than two different prompts, nothing to split")
    size = round(ratio * count)
    size = min(max(1, size), count - 1)  # neither side may be empty
    splitter = GroupShuffleSplit(1, test_size=size, random_state=seed)
    ((train, held_out),) = splitter.split(groups, groups=groups)
    train = sorted(train)
    held_out = sorted(held_out)
    return rows.select(train), rows.select(held_out)


def overlap(train: Dataset, held_out: Dataset) -> dict[str, int]:
    """How many rows of `held_out` share their prompt, and their prompt and response, with a row of
    `train`, and how many are near-copies of one (see `near_copies_between`).
    """
    pairs = {_pair_key(row) for row in train}
    prompts = {prompt for prompt, _ in pairs}
    texts = [judged_text(row) for row in held_out]
    _, copies = near_copies_between(map(judged_text, train), texts)
    counts = {
        "rows": len(held_out),
        "prompt_in_train": 0,
        "pair_in_train": 0,
        "near_copies_of_train": sum(copies),
    }
    for row in held_out:
        key = _pair_key(row)
        prompt, _ = key
        if prompt in prompts:
            counts["prompt_in_train"] += 1
        if key in pairs:
            counts["pair_in_train"] += 1
    return counts


def judged_text(row: Mapping) -> str:
    """The last prompt of a row and the response to it, of these what there is."""
    parts = last_turns(row["messages"])
    return "\n".join(part for part in parts if part is not None)


def _pair_key(row: Mapping) -> tuple[str, str | None]:
    _, response = last_turns(row["messages"])
    return prompt_key(row), response


SHINGLE = 3  # words
COPY = 0.8  # of the shingles of two texts that both have: from there on they are near-copies


class _Copies:
    """Texts, as sets of shingles, among which near-copies of another are found: MinHash (datasketch)
    names candidates, and the Jaccard index decides.
    """

    def __init__(self):
        self.index = MinHashLSH(threshold=COPY - 0.2, num_perm=128)
        self.shingles: dict[int, frozenset[str]] = {}

    def sketch(self, some: frozenset[str]) -> MinHash:
        made = MinHash(num_perm=128)
        made.update_batch([shingle.encode("utf-8", "replace") for shingle in some])
        return made

    def add(self, number: int, some: frozenset[str], sketch: MinHash) -> None:
        self.shingles[number] = some
        self.index.insert(number, sketch)

    def find(self, some: frozenset[str], sketch: MinHash) -> list[int]:
        """The numbers of the texts that are near-copies of this one."""
        found = []
        for number in self.index.query(sketch):
            other = self.shingles[number]
            if len(some & other) >= COPY * len(some | other):
                found.append(number)
        return found


def near_copies(texts: Sequence[str]) -> list[int]:
    """A group number a text. Texts that differ by a few words, as the uses of one jailbreak
    template do, share it; so do texts that differ in case, spacing or punctuation alone.
    """
    shingles = [_shingles(text) for text in texts]
    first_with = {}
    for i, some in enumerate(shingles):
        first_with.setdefault(some, i)
    copies = _Copies()
    pairs = [(first_with[some], i) for i, some in enumerate(shingles)]
    for some, i in first_with.items():
        sketch = copies.sketch(some)
        pairs += [(other, i) for other in copies.find(some, sketch)]
        copies.add(i, some, sketch)
    rows = [row for row, _ in pairs]
    columns = [column for _, column in pairs]
    ones = [1] * len(pairs)
    size = len(texts)
    graph = coo_array((ones, (rows, columns)), shape=(size, size))
    _, groups = connected_components(graph, directed=False)
    return groups.tolist()


def near_copies_between(
    many: Iterable[str],
    few: Sequence[str],
) -> tuple[list[bool], list[bool]]:
    """Of each text of two sets, whether it is a near-copy of one in the other set, or the same.

    The texts of `many` are looked at once and not kept: one that shares too few shingles with all
    of `few` together, as nearly all do, costs no sketch.
    """
    shingles = [_shingles(text) for text in few]
    places = defaultdict(list)
    copies = _Copies()
    for i, some in enumerate(shingles):
        if some not in places:
            copies.add(i, some, copies.sketch(some))
        places[some].append(i)
    anywhere = frozenset().union(*shingles)
    of_many = []
    of_few = [False] * len(few)
    for text in many:
        some = _shingles(text)
        found: list[int] = []
        if len(some & anywhere) >= COPY * len(some):  # else no Jaccard index can reach COPY
            found = copies.find(some, copies.sketch(some))
        of_many.append(bool(found))
        for first in found:
            for i in places[shingles[first]]:
                of_few[i] = True
    return of_many, of_few


def _shingles(text: str) -> frozenset[str]:
    """Every three words of a text that follow each other, without case and punctuation."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", plain) or [plain.strip()]
    count = max(1, len(words) - SHINGLE + 1)
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(count))
