"""README: its code runs as written, its tables list what there is."""

import re
from pathlib import Path

from companion.PLOTS import plots

import jumprelu as jr

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    names: dict = {}
    exec(BLOCKS[0], names)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("l0", "fvu", "delta_loss", "±"))
    assert names["sae"].d_sae == 512 and (tmp_path / "my_sae" / "cfg.json").exists()
    exec(BLOCKS[1], names)
    assert names["threshold"].grad.abs().max() > 0


def test_the_figure_table_is_complete():
    row = r"^\| \[(\d\d_\w+)\]\(figures/\1\.png\) .* `plots\.(\w+)` \| \[csv\]\(figures/\1\.csv\)"
    listed = re.findall(row, README, flags=re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(
        path.stem for path in (ROOT / "figures").glob("*.png")
    )
    for name, function in listed:
        assert name[3:] == function and callable(getattr(plots, function))


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_profiles_and_api_are_listed():
    profiles = {path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml")}
    assert profiles == set(
        re.findall(r"^\| `([\w.-]+)`(?: \(default\))? \| .*(?:CPU|GPU)", README, flags=re.MULTILINE)
    )
    table = README.split("## The API in one table")[1].split("##")[0]
    shown = {
        name
        for row in re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)", row)
    }
    assert shown <= set(jr.__all__), shown - set(jr.__all__)
