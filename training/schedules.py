"""Learning-rate schedules: pure functions step → lr, counted in optimizer steps from 0."""

from collections.abc import Sequence


def staircase(step: int, base_lr: float, supports: Sequence[int], factor: float = 10.0) -> float:
    """Linear warm-up to `base_lr`, then divided by `factor` after each boundary; 0 from the last support on.

    `supports` = (end of warm-up, decay, …, decay, end). As in the authors' code, a decay takes effect on the step
    *after* its boundary (strict comparison) and the first step of the warm-up has lr 0. Source: BiT, section 3.3.
    """
    warmup, *decays, end = supports
    if step >= end:
        return 0.0
    if step < warmup:
        return base_lr * step / warmup
    return base_lr / factor ** sum(boundary < step for boundary in decays)
