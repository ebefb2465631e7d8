"""`bit finetune --all`: one tenant's failure is that tenant's."""

from pathlib import Path

import pytest

from training.cli.stages import finetune
from training.errors import UserError


def test_a_tenant_that_fails_by_any_error_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")
    for tenant in ("ants", "bees", "cats"):
        Path("tenants", tenant).mkdir(parents=True)
        Path("tenants", tenant, "params.yaml").write_text(f"tenant: {tenant}\n")
    Path("runs/pack/bees").mkdir(parents=True)
    Path("runs/pack/bees/receipt.json").write_text("{")  # no UserError
    with pytest.raises(UserError, match="3 of 3 tenants failed: ants, bees, cats"):
        finetune(all_tenants=True)
    said = capsys.readouterr().err
    assert "bit: cats: " in said
    assert "ValidationError" in said
    with pytest.raises(ValueError, match="Invalid JSON"):
        finetune("bees")
