"""The batches of shards, in order, each with the teacher's prediction for it: asked for ahead where the teacher is elsewhere.

A teacher that holds a prediction in memory here is asked for a batch when the last one was used. One behind a server is asked
for so many sequences ahead, across the ends of batches and shards, that it never waits for what is done here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from knowledge_store.kinds.kind import Parameters
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import batch_room, find_batching, length_batches, predict_batch
from teacher_dump.dumping.plan import ShardInput
from teacher_dump.teachers.protocol import Prediction, Teacher


@dataclass(frozen=True)
class AskedBatch:
    """A batch of a shard.

    Attributes:
        indices: which sequences of the shard, int64 (B,).
        sequences: these.
        prediction: of them.
    """

    indices: np.ndarray
    sequences: list[TokenSequence]
    prediction: Prediction


@dataclass
class _Shard:
    """A shard, and what is left of it: batches that are not asked for yet, and those that are."""

    shard: ShardInput
    waiting: deque[np.ndarray]
    asked: deque[AskedBatch] = field(default_factory=deque)

    def drop(self) -> None:
        """Nothing more of it is going to be read."""
        self.waiting.clear()
        while self.asked:
            self.asked.popleft().prediction.drop()


class BatchAsker:
    """Asks a teacher for the batches of shards.

    Args:
        config, teacher: how and whom to ask.
        parameters: of each kind that is to be taken.
        shards: in order; read on only as far as is asked.
    """

    def __init__(
        self, config: DumpConfig, teacher: Teacher, parameters: Mapping[str, Parameters], shards: Iterator[ShardInput]
    ):
        self._config, self._teacher, self._parameters, self._shards = config, teacher, parameters, shards
        self._batching = find_batching(config, teacher, config.max_length)
        self._room = batch_room(config, teacher, config.max_length, parameters)
        self._queue: deque[_Shard] = deque()

    def shards(self) -> Generator[tuple[ShardInput, Iterator[AskedBatch]]]:
        """Each shard with its batches, longest sequences first. What is left of one when the next is taken is dropped."""
        try:
            while self._queue or self._read():
                current = self._queue[0]
                yield current.shard, self._batches(current)
                self._queue.popleft().drop()
        finally:
            for shard in self._queue:
                shard.drop()

    def _batches(self, current: _Shard) -> Iterator[AskedBatch]:
        while current.waiting or current.asked:
            if not current.asked:
                self._ask(current)
            while self._asked_for() < self._teacher.ahead and self._ask_on():
                pass
            yield current.asked.popleft()

    def _asked_for(self) -> int:
        """Sequences that are asked for and not read yet."""
        return sum(len(batch.sequences) for shard in self._queue for batch in shard.asked)

    def _ask_on(self) -> bool:
        """Ask for the next batch, of the next shard where the last one's are all asked for; whether there was one."""
        while not (waiting := next((shard for shard in self._queue if shard.waiting), None)):
            if not self._read():
                return False
        self._ask(waiting)
        return True

    def _ask(self, shard: _Shard) -> None:
        indices = shard.waiting.popleft()
        sequences = [shard.shard.sequences[index] for index in indices]
        prediction = predict_batch(self._config, self._teacher, sequences, self._parameters)
        shard.asked.append(AskedBatch(indices, sequences, prediction))

    def _read(self) -> bool:
        """Take the next shard; whether there was one."""
        if (shard := next(self._shards, None)) is None:
            return False
        lengths = [len(sequence.token_ids) for sequence in shard.sequences]
        self._queue.append(_Shard(shard, deque(length_batches(lengths, self._room, self._batching))))
        return True
