"""The aliases of a registered model that mean something to the service, and what one of them points to."""

from dataclasses import dataclass

CHAMPION = "champion"  # serves
ALIASES = (CHAMPION, "challenger")  # on trial


@dataclass(frozen=True)
class Wanted:
    """A version that an alias points to."""

    tenant: str
    alias: str
    version: str
