"""From params.yaml and the receipts before a stage to what its job is to do, and to its name: the same inputs, the same job."""

import json
import re
from pathlib import Path

import yaml

from training import receipt
from training.cluster.manifests import Order
from training.config import TENANT_SECTIONS, Config, ConfigError
from training.data import remote

STAGES = ("pretrain", "finetune")


def order(config: Config, stage: str, tenant: str | None, upload: bool = True) -> Order:
    """What the job is to do. With `upload` packed pictures go to the DVC remote, where pods read them by content hash."""
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} does not run on the cluster. Choices: {', '.join(STAGES)}.")
    cluster = config.cluster
    before = {"pack": receipt.read("pack", tenant)} | ({"pretrain": receipt.read("pretrain")} if tenant else {})
    sections = [config.upstream, getattr(config, stage), cluster.image]
    hashes = [artifact.sha256 for made in before.values() for artifact in made.outputs.values()]
    digest = receipt.hash_of(*sections, tenant, *hashes)[:10]
    readable = re.sub(r"[^a-z0-9]+", "-", (tenant or "").lower())[:24].strip("-")  # the hash has the whole name
    name = "-".join(part for part in ("bit", stage, readable, digest) if part)
    # What decides the result, and not how it is reached: a job with another micro_batch or image goes on from the same place.
    deciding = json.dumps(getattr(config, stage).decisive(), sort_keys=True)
    checkpoints = receipt.hash_of(stage, config.upstream, deciding, tenant, *hashes)

    params = config.model_dump(mode="json", include={"upstream", stage}, exclude_defaults=True)
    params["tracking_uri"] = cluster.tracking_uri or config.tracking_uri
    files = {}
    if tenant:
        own = {section: params.pop(section) for section in TENANT_SECTIONS if section in params}
        files[f"tenants/{tenant}/params.yaml"] = yaml.safe_dump({"tenant": tenant, **own}, sort_keys=False)
    files["params.yaml"] = yaml.safe_dump(params, sort_keys=False)
    for earlier, made in before.items():
        path = receipt.folder(earlier, tenant if earlier == "pack" else None) / receipt.FILE
        files[path.as_posix()] = _reachable(made, config, name, upload).model_dump_json(indent=1)
    return Order(name, stage, tenant, files, checkpoints)


def _reachable(made: receipt.Receipt, config: Config, name: str, upload: bool) -> receipt.Receipt:
    """A receipt whose artifacts pods can read: what lies on this machine's disk is uploaded first."""
    outputs = {}
    for key, artifact in made.outputs.items():
        if "://" in artifact.uri:
            continue  # it lies where pods can reach it
        if Path(artifact.uri).is_dir():
            if config.cluster.remote is None:
                raise ConfigError("cluster.remote is not set: the URL of the DVC remote that pods read pictures from.")
            uri = remote.push(Path(artifact.uri), config.cluster.remote, upload)
        else:
            uri = f"{config.cluster.store}/{name}/inputs/{Path(artifact.uri).name}"
            if upload:
                remote.upload(Path(artifact.uri), uri)
        outputs[key] = artifact.model_copy(update={"uri": uri})
    return made.model_copy(update={"outputs": made.outputs | outputs})


def ended_before(config: Config, name: str) -> bool:
    """Whether a job of this name left its receipt in the store, though the job itself is gone."""
    return remote.exists(f"{config.cluster.store}/{name}/{receipt.FILE}")
