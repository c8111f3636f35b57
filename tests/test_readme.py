"""What the README shows runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import compress.cli
from compress.distill import losses
from compress.recipe import build_recipe, find_recipe, parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"<!-- python -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    (tmp_path / "example.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py", run_name="__main__")
    assert "Captured" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/test.sh"])
def test_the_two_commands_are_there(script: str) -> None:
    assert script in README.split("## ")[0]
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_shown_overrides_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"`(compress run digits --prune[^`]*)`", README)
    assert shown is not None
    words = shlex.split(shown[1])[1:]
    assert compress.cli.main([*words, "--print_config"]) == 0
    assert "ratio: 0.3" in capsys.readouterr().out


def test_every_command_in_the_table_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {
        name for cell in re.findall(r"^\| `compress ([^`]*)`", README, re.MULTILINE) for name in [cell.split()[0]]
    }
    assert {"run", "bench", "cache-teacher", "predict", "recipes"} <= commands
    for name in commands | {"test", "export", "report"}:
        with pytest.raises(SystemExit) as stop:
            compress.cli.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: compress" in capsys.readouterr().out


def test_every_loss_is_in_the_table_and_the_shown_one_is_read(tmp_path: Path) -> None:
    shown = re.search(r"<!-- losses -->\n(.*?)<!-- /losses -->", README, re.DOTALL)
    assert shown is not None
    listed = set(re.findall(r"`([A-Za-z]+)`", shown[1]))
    assert listed == set(losses.__all__) - {"DistillationLoss", "FeatureLoss", "ResponseLoss"}
    section = re.search(r"## Distillation\n.*?```yaml\n(.*?)```", README, re.DOTALL)
    assert section is not None
    text = yaml.safe_load(find_recipe("digits").read_text()) | yaml.safe_load(section[1])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    recipe = build_recipe(*parse_recipe(tmp_path / "recipe.yaml"), name="recipe")
    assert [loss.name for loss in recipe.distill.losses] == ["soft_target", "attention_transfer"]
