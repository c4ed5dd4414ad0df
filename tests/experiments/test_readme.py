"""The READMEs: what they link to exists, and the snippets of the first one do what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapo_jax.cli import main
from sapo_jax.config import load
from sapo_jax.rewards import VERIFIERS, Unparsable
from sapo_jax.rewards.registry import load_plugins

ROOT = Path(__file__).parents[2]
READMES = sorted(
    path
    for folder in ("configs", "experiments", "notebooks", "sapo_jax", "tests")
    for path in (ROOT / folder).rglob("README.md")
)
LINK = re.compile(r"\]\(([^)#]+)")
FENCED = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MENTIONED = re.compile(
    r"(?<![\w./*}-])((?:sapo_jax|experiments|tests|notebooks|configs)/[\w./-]+\w)"
)


def readme_text() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def snippet(name: str) -> str:
    """The fenced block of README.md whose first line is a comment with this file name."""
    found = {match[1]: match[2] for match in FENCED.finditer(readme_text())}
    return found[name]


def test_it_is_read_in_five_minutes():
    assert len(readme_text().splitlines()) <= 200


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *READMES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_what_a_readme_points_to_exists(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in MENTIONED.findall(text) if not exists_or_is_made(name)]
    assert not missing


def exists_or_is_made(name: str) -> bool:
    """Whether the repository has this path, or names that begin so; or a snippet makes it."""
    path = ROOT / name
    return path.exists() or any(path.parent.glob(f"{path.name}*")) or name.endswith("/ungated.py")


def test_every_room_that_explains_itself_is_linked():
    linked = {(ROOT / link).resolve() for link in LINK.findall(readme_text()) if "://" not in link}
    assert {path for path in READMES if path.resolve() not in linked} == set()


# ---------------------------------------------------------------- your own model, task, objective


@pytest.fixture
def newcomer(tmp_path, monkeypatch, tiny_model) -> Path:
    """A folder with our configs, a model, problems, and the snippets of the README as files."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    for name in ("my_model.yaml", "my_task.yaml", "my_verifiers.py"):
        (tmp_path / name).write_text(snippet(name), encoding="utf-8")
    problems = [{"prompt": f"Name colour {i}.", "answer": "red"} for i in range(12)]
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "problems.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the verifiers' processes
    yield tmp_path
    VERIFIERS.pop("shorter", None)
    sys.modules.pop("my_verifiers", None)


def test_your_own_model(newcomer, capsys):
    assert main(["config", "my_model.yaml"]) == 0
    assert "models/mine" in capsys.readouterr().out
    cfg = load("my_model.yaml")
    assert (cfg.name, cfg.model.hidden_size, cfg.rewards.extract) == ("my_model", 32, "last_number")


def test_your_own_task(newcomer):
    assert main(["config", "my_task.yaml"]) == 0
    load_plugins(load("my_task.yaml").rewards.plugins)
    grade = VERIFIERS["shorter"].function
    assert grade("red", "red", {}) == 1.0 and grade("red wine", "red", {}) == 3 / 8
    with pytest.raises(Unparsable, match="empty"):
        grade("", "red", {})


@pytest.mark.slow
def test_your_own_model_learns_your_own_task(newcomer):
    """One RL step with both, through verifier processes that import the plug-in."""
    small = ["train.steps=1", "rollout.prompts_per_step=4", "rollout.group_size=2", "run_dir=run"]
    small += ["evaluate.samples=2", "optimizer.warmup_steps=0", "checkpoint.every=1"]
    small += ["data.max_prompt_tokens=256"]  # the tiny model counts bytes
    assert main(["train", "my_task.yaml", *small]) == 0
    row = json.loads((newcomer / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["verifier/error_fraction"] == 0 and 0 < row["reward/mean"] <= 1


CONFORMS = """
from sapo_jax.config import load
from sapo_jax.objectives import OBJECTIVES
from tests.objectives.conformance import CHECKS

cfg = load("configs/quickstart.yaml", ["objective={name: ungated}"]).objective
for name, check in CHECKS.items():
    check(OBJECTIVES["ungated"], cfg)
print(type(cfg).__name__, "passes", len(CHECKS), "checks")
"""


def test_your_own_objective(tmp_path):
    """In a copy of the package, changed as the README says, the objective passes the suite."""
    shutil.copytree(ROOT / "sapo_jax", tmp_path / "sapo_jax")
    for folder in ("configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "sapo_jax/objectives/ungated.py").write_text(
        snippet("sapo_jax/objectives/ungated.py")
    )
    replace_in(
        tmp_path / "sapo_jax/objectives/__init__.py",
        "OBJECTIVES: dict[str, Objective] = {",
        "from sapo_jax.objectives.ungated import ungated\n\n"
        'OBJECTIVES: dict[str, Objective] = {"ungated": ungated, ',
    )
    config_class = re.search(
        r"```python\n(@config_section\nclass Ungated:.*?)```", readme_text(), re.DOTALL
    )[1]
    replace_in(
        tmp_path / "sapo_jax/config/objective.py",
        "Objective = Annotated[\n    SAPO",
        f"{config_class}\n\nObjective = Annotated[\n    Ungated | SAPO",
    )
    done = subprocess.run(
        [sys.executable, "-c", CONFORMS], cwd=tmp_path, capture_output=True, text=True, env=None
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Ungated passes \d+ checks", done.stdout.strip())


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} no longer has {old!r} once: adapt README.md and this test"
    path.write_text(text.replace(old, new), encoding="utf-8")
