"""The queue before a guard: what concurrent requests ask is judged in batches."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common.conversation import Message, Verdict

BYTES_A_TOKEN = 4  # near enough for a budget; the guard itself counts
LONGEST_PAUSE = 60  # seconds that a refused client is asked to wait


class QueueFull(Exception):
    """More would wait than may; `seconds` says when it is worth trying again."""

    def __init__(self, seconds: int):
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


@dataclass(eq=False)
class Waiting:
    """One conversation that waits for its verdict."""

    messages: list[Message]
    tokens: int
    verdict: asyncio.Future


class BatchingQueue:
    """While the guard judges a batch, requests gather for the next one: nobody waits on purpose.

    A batch is as many conversations as a budget of tokens holds, the oldest first, so that none
    starves. The guard puts the longest of them first and pads in batches of its own.

    Args:
        judge: `Guard.judge`, run in one thread of its own. What it raises, the requests get.
        budget: tokens a batch; a longer text is a batch alone.
        most: conversations that may wait.
    """

    def __init__(
        self,
        judge: Callable[[list[list[Message]]], list[Verdict]],
        budget: int,
        most: int,
    ):
        self.judge_batch = judge
        self.budget = budget
        self.most = most
        self.waiting: deque[Waiting] = deque()
        self.arrived = asyncio.Event()
        self.speed = float(budget)  # tokens a second, of the last batch

    async def judge(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """One verdict a conversation, in order. Who is cancelled takes his out of the queue.

        Raises:
            QueueFull: at once, and nothing of these waits.
        """
        if len(self.waiting) + len(conversations) > self.most:
            tokens = sum(one.tokens for one in self.waiting)
            pause = math.ceil(tokens / self.speed)
            raise QueueFull(min(max(pause, 1), LONGEST_PAUSE))
        loop = asyncio.get_running_loop()
        asked = [Waiting(each, _tokens(each), loop.create_future()) for each in conversations]
        self.waiting.extend(asked)
        self.arrived.set()
        try:
            return await asyncio.gather(*[one.verdict for one in asked])
        except BaseException:  # cancelled, or one of them failed: the others are not needed
            for one in asked:
                if one in self.waiting:
                    self.waiting.remove(one)
            raise

    async def run(self) -> None:
        """Judge until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "guard") as thread:
            while True:
                await self.arrived.wait()
                batch = self._next_batch()
                if not batch:
                    self.arrived.clear()
                    continue
                started = time.perf_counter()
                conversations = [one.messages for one in batch]
                try:
                    said = await loop.run_in_executor(thread, self.judge_batch, conversations)
                    _answer(batch, said)
                except Exception as error:
                    _answer(batch, [error] * len(batch))
                took = time.perf_counter() - started
                self.speed = max(1.0, sum(one.tokens for one in batch) / took)

    def _next_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        room = self.budget
        while self.waiting and (not batch or self.waiting[0].tokens <= room):
            one = self.waiting.popleft()
            room -= one.tokens
            batch.append(one)
        return batch


def _answer(batch: Sequence[Waiting], said: Sequence[Verdict | Exception]) -> None:
    """Give each who still waits his verdict, or what the guard raised."""
    for one, verdict in zip(batch, said, strict=True):
        if one.verdict.done():  # cancelled in the meantime
            continue
        if isinstance(verdict, Exception):
            one.verdict.set_exception(verdict)
        else:
            one.verdict.set_result(verdict)


def _tokens(messages: Sequence[Message]) -> int:
    """About how many tokens a conversation has."""
    size = sum(len(message["content"].encode()) for message in messages)
    return 1 + size // BYTES_A_TOKEN
