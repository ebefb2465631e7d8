"""`bit weights`: what comes in goes out again, array by array, under the same keys."""

import hashlib
import importlib.util
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
from torch import nn

from tests import s3
from tests.training.models.test_npz import network
from training.models import archs, exchange, layouts, npz, zoo
from training.models.npz import WeightsError


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(params=["published", "numbered", "big_vision"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.npz"
    npz.save(network(), path, "big_vision" if request.param == "big_vision" else "published")
    if request.param == "numbered":
        numbered = {}
        for n, (key, array) in enumerate(arrays(path).items()):
            numbered[re.sub("standardized_conv2d", f"standardized_conv2d_{n}", key)] = array
        np.savez(path, **numbered)
    return path


def test_import_then_export_gives_the_same_keys_and_arrays(published: Path, tmp_path: Path) -> None:
    exchange.convert(published, tmp_path / "in.npz", "R14x0.5")
    exchange.convert(tmp_path / "in.npz", tmp_path / "out.npz", "R14x0.5")
    assert same(arrays(published), arrays(tmp_path / "out.npz"))


def test_a_chosen_layout_is_what_the_network_would_write(published: Path, tmp_path: Path) -> None:
    for layout in ("published", "big_vision"):
        exchange.convert(published, tmp_path / "chosen.npz", "R14x0.5", layout)  # type: ignore[arg-type]
        npz.save(network(), tmp_path / "written.npz", layout)  # type: ignore[arg-type]
        assert (tmp_path / "chosen.npz").read_bytes() == (tmp_path / "written.npz").read_bytes()


def test_the_head_is_kept_dropped_or_replaced(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    exchange.convert(published, out, "R14x0.5", head="drop")
    assert not any(layouts.canonical(key) in layouts.HEAD for key in arrays(out))
    assert not npz.load(zoo.create("R14x0.5", 3), out, head=False).head.weight.any()
    with pytest.raises(WeightsError, match="its head was dropped"):
        npz.num_classes(out)
    exchange.convert(published, out, "R14x0.5", head="replace", num_classes=9)
    loaded = npz.load(zoo.create("R14x0.5", 9), out)
    assert not loaded.head.weight.any()
    assert torch.equal(loaded.stem.weight, network().stem.weight)
    with pytest.raises(WeightsError, match="needs its number of classes"):
        exchange.convert(published, out, "R14x0.5", head="replace")


def test_timms_state_dict_comes_in_and_goes_out(published: Path, tmp_path: Path) -> None:
    exchange.convert(published, tmp_path / "timm.pth", "R14x0.5")
    exchange.convert(tmp_path / "timm.pth", tmp_path / "back.npz", "R14x0.5", "published")
    npz.save(network(), tmp_path / "expected.npz")
    assert same(arrays(tmp_path / "back.npz"), arrays(tmp_path / "expected.npz"))
    (tmp_path / "bad.pth").write_bytes(b"no archive")
    with pytest.raises(WeightsError, match="is not a state dict"):
        exchange.convert(tmp_path / "bad.pth", tmp_path / "out.npz", "R14x0.5")


def test_a_file_of_another_arch_is_refused_with_its_own(published: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"The file is of arch R14x0\.5"):
        exchange.convert(published, tmp_path / "out.npz", "R50x1")
    assert not list(tmp_path.glob("*out*"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_the_command_fetches_over_http_and_prints_or_checks_the_sha256(server: str, tmp_path: Path) -> None:
    npz.save(network(), tmp_path / "w.npz")
    digest = hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
    command = [sys.executable, "-m", "training", "weights", "import", f"{server}/w.npz", "--arch", "R14x0.5"]
    command += ["--out", str(tmp_path / "new" / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, digest in done.stdout) == (0, True), done.stderr
    assert same(arrays(tmp_path / "w.npz"), arrays(tmp_path / "new" / "out.npz"))
    done = subprocess.run([*command, "--sha256", "0" * 64], capture_output=True, text=True, check=False)
    assert (done.returncode, digest in done.stderr) == (2, True)
    for source in (f"{server}/none.npz", str(tmp_path / "none.npz"), "nosuch://a/b.npz"):
        with pytest.raises(WeightsError, match="cannot be fetched"):
            exchange.fetch(source, tmp_path / "f.npz")


@pytest.fixture
def tls(server: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The same files over https: (address, certificate that signs for it)."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as httpd:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{httpd.server_port}", certificate
        httpd.shutdown()
        thread.join()


def test_https_is_fetched_where_its_certificate_is_trusted(tls: tuple[str, Path], tmp_path: Path) -> None:
    address, certificate = tls
    npz.save(network(), tmp_path / "w.npz")
    command = [sys.executable, "-m", "training", "weights", "import", f"{address}/w.npz", "--arch", "R14x0.5"]
    command += ["--out", str(tmp_path / "out.npz")]
    trusting = os.environ | {"SSL_CERT_FILE": str(certificate)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=trusting)
    assert done.returncode == 0, done.stderr
    assert same(arrays(tmp_path / "w.npz"), arrays(tmp_path / "out.npz"))
    (tmp_path / "out.npz").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be fetched" in done.stderr
    assert "certificate" in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_s3_is_fetched(tmp_path: Path) -> None:
    npz.save(network(), tmp_path / "w.npz")
    with s3.serving("weights") as bucket:
        s3fs.S3FileSystem().put_file(str(tmp_path / "w.npz"), f"{bucket}/bit/w.npz")
        digest = exchange.fetch(f"{bucket}/bit/w.npz", tmp_path / "fetched.npz")
        assert digest == hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
        with pytest.raises(WeightsError, match=r"s3://weights/bit/none.npz' cannot be fetched"):
            exchange.fetch(f"{bucket}/bit/none.npz", tmp_path / "none.npz")


def test_a_store_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.fail("gcsfs is installed: fetch from a server here")
    with pytest.raises(WeightsError, match=r"gs://bucket/w.npz' cannot be fetched: .*gcsfs"):
        exchange.fetch("gs://bucket/w.npz", tmp_path / "w.npz")


# (21,843 classes, 1,000 classes, body), (GMAC at 128, 224, 480): counted from the authors' files and timm's networks.
PUBLISHED = {
    "R50x1": ((68_256_659, 25_549_352, 23_500_352), (1.33, 4.09, 18.8)),
    "R101x1": ((87_248_787, 44_541_480, 42_492_480), (2.55, 7.8, 35.8)),
    "R50x3": ((345_399_315, 217_319_080, 211_174_080), (11.8, 36.1, 166)),
    "R101x3": ((516_015_123, 387_934_888, 381_789_888), None),
    "R152x2": ((321_728_979, 236_335_208, 232_238_208), (15, 45.8, 210)),
    "R152x4": ((1_107_299_923, 936_533_224, 928_340_224), (59.7, 183, 839)),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_counts_of_the_zoo_are_the_published_ones(arch: str) -> None:
    (many, thousand, body), costs = PUBLISHED[arch]
    assert [archs.num_parameters(arch, classes) for classes in (21_843, 1_000, 0)] == [many, thousand, body]
    for side, cost in zip((128, 224, 480), costs or (), strict=False):
        assert archs.gmac(arch, side) == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(("arch", "side"), [("R14x0.5", 95), ("R50x3", 128), ("R101x1", 224), ("R152x2", 33)])
def test_the_arithmetic_of_the_zoo_is_what_the_network_has_and_does(arch: str, side: int) -> None:
    model, total = zoo.outline(arch, 7), 0
    assert sum(parameter.numel() for parameter in model.parameters()) == archs.num_parameters(arch, 7)

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (output.shape[2:].numel() if isinstance(layer, nn.Conv2d) else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    assert total / 1e9 == archs.gmac(arch, side, 7)


def test_the_zoo_prints_without_a_framework_in_two_seconds() -> None:
    began = os.times()
    code = "import sys; from training.cli import weights; weights.zoo(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    spent = os.times()
    assert done.returncode == 0, done.stderr
    assert "R152x4   3-8-36-3  928,340,224 936,533,224 1,107,299,923   59.69  182.78" in done.stdout
    assert spent.children_user + spent.children_system - began.children_user - began.children_system < 2


def test_an_empty_network_is_filled_like_a_fresh_one(tmp_path: Path) -> None:
    npz.save(network(), tmp_path / "w.npz")
    model = npz.load(zoo.empty("R14x0.5", 5), tmp_path / "w.npz")
    assert all(torch.equal(a, b) for a, b in zip(network().parameters(), model.parameters(), strict=True))
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
