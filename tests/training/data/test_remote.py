"""Folders by content hash, as they lie in a DVC remote: what is fetched is what its hash says, or it is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from training.data import remote
from training.data.remote import Folder, RemoteError


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A folder in a remote that is not on this machine's disk."""
    monkeypatch.setenv("BIT_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "packed"
    source.mkdir()
    (source / "index.json").write_text("{}")
    (source / "train-00000.tar").write_bytes(bytes(range(256)) * 5000)
    yield Folder(remote.push(source, "memory://dvc"))
    fsspec.filesystem("memory").rm("/dvc", recursive=True)


def object_of(folder: Folder, name: str) -> str:
    return folder.path(name).removeprefix("memory:/")


def test_a_file_is_fetched_once_and_read_at_random(pushed: Folder, tmp_path: Path) -> None:
    with pushed.open("train-00000.tar") as file:
        file.seek(257)
        assert file.read(3) == bytes([1, 2, 3])
    fsspec.filesystem("memory").rm(object_of(pushed, "train-00000.tar"))
    assert pushed.read("train-00000.tar") == bytes(range(256)) * 5000
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 1_280_000, bytes(range(256)) * 4999])
def test_a_damaged_file_is_refused_and_not_kept(pushed: Folder, tmp_path: Path, damage: bytes) -> None:
    with fsspec.open(pushed.path("train-00000.tar"), "wb") as file:
        file.write(damage)
    with pytest.raises(RemoteError, match=r"hashes to .*, its name says .*`dvc push`"):
        pushed.open("train-00000.tar")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert pushed.read("index.json") == b"{}"


def test_a_damaged_listing_is_refused(pushed: Folder) -> None:
    with fsspec.open(pushed.url, "wb") as file:
        file.write(b"[]")
    with pytest.raises(RemoteError, match="hashes to"):
        pushed.open("index.json")


def test_a_push_that_sends_nothing_tells_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    told = remote.push(tmp_path / "a", f"{tmp_path}/remote", send=False)
    assert not (tmp_path / "remote").exists()
    assert remote.push(tmp_path / "a", f"{tmp_path}/remote") == told
    assert Folder(told).read("x") == b"x"


def test_a_store_without_keys_or_that_does_not_answer_fails_as_a_disk_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    url = "s3://bit-has-no-keys/error.txt"
    with pytest.raises(OSError, match="NoCredentialsError"):
        remote.write(b"words", url)
    with pytest.raises(OSError, match="NoCredentialsError"):
        remote.exists(url)
    assert remote.text(url) is None
