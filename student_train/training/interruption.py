"""What happens at Ctrl-C in training.

1. The first Ctrl-C (or SIGTERM, which schedulers send) only sets `trainer.stop_asked`; the step that is running is finished.
2. When the trainer draws the batches of its next step, all processes agree to stop after it (`get_batch_samples`).
3. At the end of that step a checkpoint is saved and training stops (`on_step_end` of the trainer's callback).
4. `run.train` returns a result that is not finished, whose step is that of the checkpoint, and the command ends with code 130.

A second Ctrl-C stops at once, without a checkpoint: the run resumes from the last one that is complete.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from knowledge_store.reporter import Reporter
from student_train.training.run_trainer import RunTrainer


@contextmanager
def stop_on_interrupt(trainer: RunTrainer, reporter: Reporter) -> Iterator[None]:
    """While the body runs, Ctrl-C and SIGTERM stop training as described above; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if trainer.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if trainer.is_world_process_zero() and not trainer.stop_asked:
            reporter.note("Stopping after the next step. Press Ctrl-C again to stop at once, without a checkpoint.")
        trainer.stop_asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
