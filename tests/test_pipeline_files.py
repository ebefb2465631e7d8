"""dvc.yaml against the code: a stage's deps cover every module that it imports, and every tenant's file is the same."""

from pathlib import Path

import grimp
import pytest
import yaml

from training.params import tenants

ROOT = Path(__file__).parents[1]
GRAPH = grimp.build_graph("training", "services")


def stages() -> list[tuple[str, str, list[str]]]:
    """(file, stage, deps as paths from the root) of the root's and one tenant's pipeline."""
    found = []
    for file in ("dvc.yaml", "tenants/digits/dvc.yaml"):
        for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items():
            deps = [str((ROOT / file).parent.joinpath(dep).resolve().relative_to(ROOT)) for dep in stage["deps"]]
            found.append((file, name, deps))
    return found


def files_of(module: str) -> set[str]:
    """The module and everything of ours that it imports, as paths; packages' empty __init__ files left out."""
    modules = {module} | GRAPH.find_upstream_modules(module)
    paths = {ROOT / Path(*name.split(".")) for name in modules}
    return {str(path.with_suffix(".py").relative_to(ROOT)) for path in paths if path.with_suffix(".py").is_file()}


@pytest.mark.parametrize(("file", "stage", "deps"), stages(), ids=lambda value: value if isinstance(value, str) else "")
def test_deps_cover_every_import_and_nothing_else(file: str, stage: str, deps: list[str]) -> None:
    needed = files_of(f"training.{stage}")
    missing = {path for path in needed if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)}
    assert not missing, f"{file}: {stage} imports what its deps leave out"
    code = [dep for dep in deps if dep.startswith(("training", "services"))]
    unused = {dep for dep in code if not any(path == dep or path.startswith(f"{dep}/") for path in needed)}
    assert not unused, f"{file}: {stage} depends on what it doesn't import"


def test_every_tenant_has_the_same_pipeline() -> None:
    files = {(ROOT / "tenants" / tenant / "dvc.yaml").read_bytes() for tenant in tenants(ROOT)}
    assert len(files) == 1


def test_a_stage_depends_on_every_stage_whose_receipt_it_reads() -> None:
    for file, stage, deps in stages():
        source = (ROOT / "training" / f"{stage}.py").read_text()
        for other in ("pack", "pretrain", "finetune", "evaluate", "export"):
            if f'receipt.read("{other}"' in source:
                assert any(dep.startswith(f"runs/{other}") for dep in deps), (
                    f"{file}: {stage} reads the receipt of {other}"
                )
