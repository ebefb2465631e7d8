"""Commands about architectures and weight files."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from training.models.archs import HeadChoice, Layout

SIDES = (128, 224, 384, 480)
Arch = Annotated[str, typer.Option(help="Row of `bit zoo` that the file must fit.")]
Out = Annotated[Path, typer.Option(help="Where to write: .npz, or .pth for timm's state dict.")]
Keys = Annotated[Layout | None, typer.Option(help="Keys to write; left out, those of the file stay.")]


def zoo() -> None:
    """The table of architectures: parameters, GMAC per picture, size of a checkpoint and of an export."""
    from training.models import archs

    columns = " ".join(f"{f'@{side}':>7}" for side in SIDES)
    print(f"{'arch':<8} {'units':<9} {'body':>11} {'1,000':>11} {'21,843':>13} {columns} {'ckpt':>8} {'export':>8}")
    for name, arch in archs.ARCHS.items():
        body, thousand, many = (archs.num_parameters(name, classes) for classes in (0, 1_000, 21_843))
        gmac = " ".join(f"{archs.gmac(name, side):7.2f}" for side in SIDES)
        units = "-".join(map(str, arch.units))
        # A checkpoint holds weights and momentum, an export the weights; both in float32.
        sizes = f"{size(8 * thousand):>8} {size(4 * thousand):>8}"
        print(f"{name:<8} {units:<9} {body:>11,} {thousand:>11,} {many:>13,} {gmac} {sizes}")
    print(
        "Parameters of the body and with 1,000 and 21,843 classes; GMAC by side of the picture; sizes with 1,000 classes."
    )


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def import_(
    source: Annotated[str, typer.Argument(help="Published .npz or timm's .pth: a path or any fsspec URL.")],
    arch: Arch,
    out: Out,
    head: Annotated[HeadChoice, typer.Option(help="What becomes of the head.")] = "keep",
    classes: Annotated[int | None, typer.Option(help="Outputs of a replaced head, which starts at zero.")] = None,
    layout: Keys = None,
    sha256: Annotated[str | None, typer.Option(help="What the file must hash to; printed when left out.")] = None,
) -> None:
    """Fetch a weights file, check every key, shape and value, and write it."""
    from training.models import exchange

    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder:
        fetched = Path(folder, f"weights{Path(source).suffix or '.npz'}")
        digest = exchange.fetch(source, fetched, sha256)
        exchange.convert(fetched, out, arch, layout, head, classes)
    print(f"{out}: {arch}, from {source} with sha256 {digest}")


def export(
    source: Annotated[Path, typer.Argument(help="A weights file, such as runs/pretrain/weights.npz.")],
    arch: Arch,
    out: Out,
    layout: Keys = None,
) -> None:
    """Write a weights file in a published layout, or as timm's state dict (.pth)."""
    from training.models import exchange

    exchange.convert(source, out, arch, layout)
    print(f"{out}: {arch}, {size(out.stat().st_size)}")


def show(source: Annotated[Path, typer.Argument(help="A weights file (.npz).")]) -> None:
    """Which architecture, layout and head a weights file holds."""
    from training.models import layouts, npz

    with npz.opened(source) as archive:
        count, layout = len(archive.files), layouts.layout_of(archive.files)
        headless = not any(layouts.canonical(key) == layouts.HEAD[1] for key in archive.files)
    classes = "no head" if headless else f"{npz.num_classes(source):,} classes"
    print(f"{source}: {npz.arch_of(source) or 'no arch of the zoo'}, {layout} keys, {count} arrays, {classes}")


COMMANDS = {"import": import_, "export": export, "show": show}
