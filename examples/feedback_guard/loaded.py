"""A model that is there only while it is needed."""

import gc
from collections.abc import Callable
from typing import Any

import torch


class Loaded:
    """A model that is loaded when it is first needed, and can be let go."""

    def __init__(self, load: Callable[[], Any]):
        self.load, self.model = load, None

    def get(self) -> Any:
        """The model, loaded once."""
        self.model = self.load() if self.model is None else self.model
        return self.model

    def free(self) -> None:
        """Give its memory back."""
        if self.model is None:
            return
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
