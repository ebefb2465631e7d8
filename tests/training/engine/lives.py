"""A training that is killed at random moments until it was killed so often, then left to end.

    python -m tests.training.engine.lives DATASET WEIGHTS STEPS NAME KILLS SEED

Every life is a fork of this process, which has imported all there is but started nothing: a life begins within milliseconds.
"""

import os
import random
import signal
import sys
import time

import torch

from tests.training.engine import small_training


def life(arguments: list[str]) -> int:
    """The pid of a new life."""
    if pid := os.fork():
        return pid
    try:
        small_training.main(*arguments)
    except BaseException:  # as the interpreter ends: the fork must not return into its parent's code
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def lasts(pid: int, seconds: float) -> int | None:
    """Exit status of a life that ends within `seconds`, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def main(dataset: str, weights: str, steps: str, name: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    arguments, rng = [dataset, weights, steps, name], random.Random(seed)
    began = time.monotonic()
    if lasts(life([dataset, f"{weights}.straight.npz", steps, f"{name}-straight"]), 300) != 0:
        sys.exit("the undisturbed training did not end well")
    whole_s, killed = time.monotonic() - began, 0
    while killed < int(kills):
        pid = life(arguments)
        status = lasts(pid, rng.uniform(0, whole_s / 4))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
        elif status != 0:
            sys.exit(f"a life ended with {status}")
    if lasts(life(arguments), 300) != 0:
        sys.exit("the last life did not end well")
    print(f"{killed} kills")


if __name__ == "__main__":
    main(*sys.argv[1:])
