"""What the tag `serving.state` of a version says, and which state may be written over which."""

import time

LIVE, TRIAL, COLD, REPLACED, REFUSED = "live", "on trial", "cold", "replaced", "refused"
SERVED = (LIVE, TRIAL, COLD)
# state → what an instance that comes later (a restart, another replica) does not write over it: it knows less, or the same.
KEPT: dict[str, tuple[str, ...]] = {
    LIVE: (LIVE, TRIAL, COLD),
    TRIAL: (TRIAL, COLD),
    COLD: (COLD,),
    REPLACED: (REPLACED,),
    REFUSED: (REPLACED,),
}


def kind(state: str) -> str:
    """The state's first words, empty for a text that isn't one."""
    return next((known for known in KEPT if state.startswith(known)), "")


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
