"""Every setting of the service: a flag of `bit-serve` and an environment variable BIT_SERVE_… each."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MiB = 2**20


class Settings(BaseSettings):
    """Serve every tenant's promoted model over HTTP. Each flag is also a variable, as in BIT_SERVE_POLL_INTERVAL_S=1."""

    model_config = SettingsConfigDict(env_prefix="BIT_SERVE_", frozen=True, extra="forbid", cli_prog_name="bit-serve")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    tracking_uri: str = Field("http://127.0.0.1:5000", description="MLflow server whose registry is followed")
    models: Path | None = Field(None, description="folder of exports to serve instead of a registry")
    only: list[str] = Field([], description="tenants to serve; all if empty")
    tenants: Path | None = Field(None, description="JSON file of keys and quotas; without it everybody may ask")

    cache_dir: Path = Field(Path(".serve/cache"), description="where downloaded exports are kept, by sha256")
    cache_mb: int = Field(
        8_192, ge=0, description="disk for downloaded exports; those used longest ago give way; 0: no limit"
    )
    poll_interval_s: float = Field(2.0, gt=0, description="seconds between two looks at the registry")
    write_back: bool = Field(True, description="tell MLflow what became of a version (tag serving.state)")
    memory_mb: int = Field(0, ge=0, description="memory for models; the least recently used give way; 0: no limit")
    pinned: list[str] = Field([], description="tenants whose models never give way")
    cold: Literal["wait", "refuse"] = Field(
        "wait", description="a request for a model that isn't in memory waits for it, or gets 503 while it loads"
    )

    workers: int = Field(os.cpu_count() or 1, ge=1, description="threads that decode and infer, one core each")
    max_batch: int = Field(2, ge=1, description="pictures that a thread takes at once")
    max_batch_ms: float = Field(20, gt=0, description="work that a thread takes at once; more makes other tenants wait")
    max_queue_ms: float = Field(2_000, gt=0, description="work that may wait; above it requests get 503")
    timeout_ms: float = Field(
        30_000, gt=0, description="longest deadline of a request, and that of one that names none"
    )

    max_body_bytes: int = Field(20 * MiB, ge=1, description="largest request body, also after decompression")
    max_json_bytes: int = Field(
        4 * MiB,
        ge=1,
        description="largest JSON of tensors (one picture of 480 × 480 is 2.5 MB); binary tensors hold more",
    )
    max_bodies_mb: int = Field(256, ge=1, description="memory for the bodies of all requests at once")
    max_pictures: int = Field(64, ge=1, description="largest number of pictures in one request")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture that is decoded")
    max_decode_ms: float = Field(
        2_000,
        gt=0,
        description="after this time no further picture of a request is decoded (413); max_pixels bounds one alone",
    )
    header_timeout_s: float = Field(10, gt=0, description="a connection that sends no complete header is closed")
    body_timeout_s: float = Field(20, gt=0, description="a body that takes longer gets 408")
    answer_timeout_s: float = Field(60, gt=0, description="an answer that is not read in this time is cut off")
    keep_alive_s: float = Field(
        75, gt=0, description="idle connections are kept this long; longer than a balancer does"
    )
    drain_s: float = Field(0, ge=0, description="on SIGTERM, seconds of answering on while not ready any more")
    grace_s: int = Field(30, ge=1, description="after that, seconds for the requests that still run")
    access_log: bool = Field(True, description="one JSON line on standard output per inference request")
