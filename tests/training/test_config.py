"""params.yaml: what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest

from training.cli.stages import stage
from training.config import Config, ConfigError
from training.params import load


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("pretrain: {steps: 100, warmup_steps: 10}\nfinetune: {global_batch: 64}\n")
    (tmp_path / "tenants" / "cats").mkdir(parents=True)
    (tmp_path / "tenants" / "cats" / "params.yaml").write_text("tenant: cats\nfinetune: {flips: false}\n")
    return tmp_path


def test_a_tenant_overrides_key_by_key(project: Path) -> None:
    config = load(project, "cats")
    assert (config.finetune.flips, config.finetune.global_batch) == (False, 64)
    assert load(project).finetune.flips is True


def test_set_overrides_everything(project: Path) -> None:
    assert load(project, "cats", ["finetune.flips=true", "pretrain.steps=200"]).pretrain.steps == 200


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.stesp=5", "did you mean 'steps'"),
        ("pretrian.steps=5", "did you mean 'pretrain'"),
        ("pretrain.steps=many", "pretrain.steps = 'many'"),
        ("pretrain.steps=0", "greater than or equal to 1"),
        ("runner=slurm", "Input should be 'local'"),
        ("pretrain.warmup_steps=90", "do not rise"),
        ("pretrain", "section.key=value"),
        ("benchmark.published=[{nmae: x}]", r"published\.0\.nmae is not a key of params.yaml: did you mean 'name'"),
        ("pack.splits={../escaped: 1.0}", r"pack\.splits\.\.\./escaped"),
    ],
)
def test_a_wrong_value_is_named_with_the_choices(project: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(project, overrides=[override])


def test_an_unknown_tenant_is_named_with_the_choices(project: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cats'"):
        load(project, "cat")


@pytest.mark.parametrize("name", ["upstream", "bit-upstream", "it's", "cats@home", "-cats", "kätzchen"])
def test_a_tenants_name_that_other_parts_could_not_carry_is_refused(project: Path, name: str) -> None:
    (project / "tenants" / name).mkdir()
    (project / "tenants" / name / "params.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="Rename its folder below tenants/"):
        load(project, name)


@pytest.mark.parametrize("options", [{"fork": True}, {"profile": 5}])
def test_what_runs_here_only_is_refused_on_the_cluster(options: dict[str, Any]) -> None:
    [option] = options
    with pytest.raises(ConfigError, match=f"--{option}: for a training that runs here only: --set runner=local"):
        stage("pretrain", Config(runner="kubernetes"), **({"fork": False, "profile": 0} | options))


def test_a_tenant_cannot_set_what_all_share(project: Path) -> None:
    (project / "tenants" / "cats" / "params.yaml").write_text("pretrain: {steps: 1}\n")
    with pytest.raises(ConfigError, match="cannot be set by a tenant"):
        load(project, "cats")


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().pretrain.steps = 5  # type: ignore[misc]


def test_the_projects_own_files_are_valid() -> None:
    for tenant in (None, "digits", "textures"):
        load(Path(), tenant)
