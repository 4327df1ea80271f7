"""What every guard is: something that judges conversations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from common.conversation import Messages, Verdict

LONG_INPUTS = ("windows", "error", "truncate")


class Guard(ABC):
    """What judges conversations. `name` says which; `thresholds` are the ones that its training fitted.

    The last turn is judged: a user's as a prompt, an assistant's as a response. Where a guard's format says more in the
    same pass (the prompt of an answered conversation, whether the answer is a refusal), its verdict holds that too.
    """

    name: str
    thresholds: dict[str, dict[str, Any]]
    judges: Sequence[str] = ("response_unsafe",)  # of LABELS: what it can be asked

    @abstractmethod
    def judge(self, conversations: Sequence[Messages]) -> list[Verdict]:
        """One verdict a conversation, in order."""

    def moderate(self, conversations: Sequence[Messages], **_: Any) -> list[float]:
        """GuardBench's callback: the unsafe probability of each last turn, 1.0 where the guard says none ("n/a")."""
        labels = ["response_unsafe" if m[-1]["role"] == "assistant" else "prompt_unsafe" for m in conversations]
        said = zip(self.judge(conversations), labels, strict=True)
        return [1.0 if getattr(v, k) is None and k in self.judges else v.score(k) for v, k in said]
