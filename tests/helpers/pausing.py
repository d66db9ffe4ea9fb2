"""A callback that makes a run wait, so that a test can kill it before it is finished."""

import os
import signal
import time

import lightning


class Pause(lightning.Callback):
    """Wait before the first batch after a step until the process is killed, for at most ten minutes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= self.step:
            time.sleep(600)


class Press(lightning.Callback):
    """Press Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
