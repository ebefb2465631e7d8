"""Who may ask, and how much: keys and quotas per tenant, decided at a request's headers, before its body is read.

A JSON file names the tenants (a Secret, in a cluster); it is read again when it changes:

    {"acme": {"keys": ["<sha256 of a key>"], "requests_per_s": 50, "concurrent": 8, "bytes_per_s": 10000000, "weight": 2},
     "*":    {"keys": ["<sha256 of the operator's key>"], "concurrent": 64}}

"*" holds the operator's keys, which open every tenant, and the quotas of tenants that are not named. A key is 32 random bytes, so
that its plain SHA-256 tells nothing about it. `bit-serve-key acme --file tenants.json` makes one and prints it once.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import secrets
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.inference.errors import Forbidden, TooManyRequests, Unauthorized

log = logging.getLogger("bit.tenants")
ANYBODY = "*"
Headers = dict[bytes, bytes]


def _digest(text: str) -> str:
    """The text is not told: what stands where a hash belongs is a plain key more often than not."""
    if len(text) != 64 or set(text.lower()) - set(string.hexdigits):
        raise ValueError(
            f"{len(text)} characters that are no SHA-256 (64 hex digits); `bit-serve-key TENANT --file FILE` makes a key "
            "and writes its hash"
        )
    return text.lower()


class Quota(BaseModel):
    """What one tenant may ask for; None is no limit. weight: its share of the machine beside other tenants' weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: frozenset[Annotated[str, AfterValidator(_digest)]] = Field(
        frozenset(), description="SHA-256 of each key, as hex"
    )
    requests_per_s: float | None = Field(None, gt=0)
    concurrent: int | None = Field(None, ge=1)
    bytes_per_s: float | None = Field(None, gt=0)
    weight: float = Field(1.0, gt=0)

    def same_limits(self, other: Self) -> bool:
        return self.model_dump(exclude={"keys"}) == other.model_dump(exclude={"keys"})


FILE = TypeAdapter(dict[str, Quota])


@dataclass
class Bucket:
    """A token bucket that holds one second's worth (at least one request). Not for several threads."""

    rate: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.size = self.level = max(1.0, self.rate)
        self.at = self.clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken, 0 for now.

        What is larger than the whole bucket is let through when it is full: then the debt delays those after it.
        """
        now = self.clock()
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        missing = min(amount, self.size) - self.level
        return missing / self.rate if missing > 0 else 0.0

    def take(self, amount: float) -> None:
        """Also more than there is: the debt delays those after it."""
        self.level -= amount


class Gate:
    """One tenant's quota in use: `enter` before a request runs, `leave` when it ended."""

    def __init__(self, quota: Quota, clock: Callable[[], float]) -> None:
        self.quota, self.running = quota, 0
        self.requests = Bucket(quota.requests_per_s, clock) if quota.requests_per_s else None
        self.bytes = Bucket(quota.bytes_per_s, clock) if quota.bytes_per_s else None

    def enter(self) -> Quota:
        self.running += 1
        return self.quota

    def leave(self) -> None:
        self.running -= 1


@dataclass
class Tenants:
    """Keys and quotas in force. path: the file, None for a service that is open to everybody without limits."""

    path: Path | None
    clock: Callable[[], float] = time.monotonic
    quotas: dict[str, Quota] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gates: dict[str, Gate] = {}
        self._seen: tuple[int, int] | None = None
        self.owners: dict[str, str] = {}
        if self.path is not None:
            self.reload()

    @classmethod
    def open_to_all(cls) -> Self:
        return cls(None)

    def reload(self) -> bool:
        """Reads the file again where it changed; True where it did. Raises ValueError, and then keeps what is in force."""
        assert self.path is not None
        stat = self.path.stat()
        if (seen := (stat.st_mtime_ns, stat.st_ino)) == self._seen:
            return False
        try:
            quotas = FILE.validate_json(self.path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{self.path} is not a file of tenants: {_told(error)}") from None
        self._seen, self.quotas = seen, quotas
        self.owners = {digest: name for name, quota in quotas.items() for digest in quota.keys}
        # What was used stays used, except where the limits changed: there, running requests finish on the gate that let them in.
        self._gates = {name: gate for name, gate in self._gates.items() if gate.quota.same_limits(self._quota(name))}
        return True

    async def follow(self, interval_s: float) -> None:
        """Keys and quotas follow their file; one that cannot be read leaves in force what was."""
        while self.path is not None:
            await asyncio.sleep(interval_s)
            try:
                if self.reload():
                    log.info("keys and quotas read again from %s", self.path)
            except (OSError, ValueError) as error:
                log.error("keys and quotas stay as they were: %s", error)

    def owner(self, headers: Headers) -> str:
        """Whose key the request carries (`Authorization: Bearer …` or `X-Api-Key`). Raises Unauthorized."""
        if self.path is None:  # not where no key is left: whose last key was revoked must not open all doors by that
            return ANYBODY
        key = headers.get(b"x-api-key", b"")
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        if not key and scheme.lower() == b"bearer":
            key = bearer.strip()
        if not key:
            raise Unauthorized("a key is needed: send it as `Authorization: Bearer <key>` or `X-Api-Key: <key>`")
        owner = self.owners.get(hashlib.sha256(key).hexdigest())
        if owner is None:
            raise Unauthorized("nobody has this key; ask the operator of the service for one")
        return owner

    def authorize(self, tenant: str, headers: Headers) -> str:
        """The key's owner. Raises Unauthorized or Forbidden where the key does not open this tenant."""
        if (owner := self.owner(headers)) not in (tenant, ANYBODY):
            raise Forbidden(f"this key is not one of {tenant!r}")
        return owner

    def admit(self, tenant: str, size_bytes: int) -> Gate:
        """Counts a request against its tenant's quota; the caller holds the gate while it runs.

        Raises TooManyRequests with when to come again: both buckets are asked before one is taken from, a refusal costs nothing.
        """
        gate = self._gates.get(tenant)
        if gate is None:
            gate = self._gates[tenant] = Gate(self._quota(tenant), self.clock)
        most, requests, size = gate.quota.concurrent, gate.requests, gate.bytes
        if most is not None and gate.running >= most:
            raise TooManyRequests(f"{most} requests of {tenant!r} are running, its limit")
        if requests and (wait_s := requests.wait_s(1)):
            raise TooManyRequests(f"{tenant!r} is over its {requests.rate:g} requests per second", wait_s)
        if size:
            if wait_s := size.wait_s(size_bytes):
                raise TooManyRequests(f"{tenant!r} is over its {size.rate:g} bytes per second", wait_s)
            size.take(size_bytes)
        if requests:
            requests.take(1)
        return gate

    def _quota(self, tenant: str) -> Quota:
        return self.quotas.get(tenant) or self.quotas.get(ANYBODY) or Quota()

    def charge(self, tenant: str, size_bytes: int) -> None:
        """Counts a body whose length no header told (chunked): its debt delays those after it."""
        gate = self._gates.get(tenant)
        if gate is not None and gate.bytes is not None:
            gate.bytes.take(size_bytes)


def _told(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in error.errors())


def main() -> None:
    """bit-serve-key TENANT --file tenants.json: adds a new key's hash to the file and prints the key, once."""
    parser = argparse.ArgumentParser(
        "bit-serve-key", description="Make a key for a tenant; the file keeps its hash only."
    )
    parser.add_argument("tenant", help='name of the tenant; "*" for a key of the operator, which opens all')
    parser.add_argument("--file", type=Path, required=True, help="file of tenants; made when it is not there")
    parser.add_argument("--revoke", action="store_true", help="first remove the keys that the tenant has")
    given = parser.parse_args()
    try:
        known = json.loads(given.file.read_text()) if given.file.exists() else {}
    except ValueError as error:
        sys.exit(f"bit-serve-key: {given.file} is not JSON ({error}): fetch the present one again; nothing was changed")
    key = secrets.token_urlsafe(32)
    entry = known.setdefault(given.tenant, {})
    entry["keys"] = [*([] if given.revoke else entry.get("keys", [])), hashlib.sha256(key.encode()).hexdigest()]
    try:
        FILE.validate_python(known)
    except ValidationError as error:
        sys.exit(f"bit-serve-key: {given.file} is not a file of tenants: {_told(error)}")
    temporary = given.file.with_name(f".{given.file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=2) + "\n")
    temporary.chmod(0o600)
    temporary.rename(given.file)
    print(key)
