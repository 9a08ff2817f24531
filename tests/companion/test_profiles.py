"""Profiles and the parameters of notebooks, also through the command line; no notebook runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from companion.rails.profiles import _fits, check_profile, find_notebooks, load_profile
from companion.rails.reproduce import main

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.stem for path in (ROOT / "notebooks/profiles").glob("*.yaml"))

TOY = """
# %% tags=["parameters"]
steps: int = 3  # points
scale: float = 1.0
kinds: list[str] = ["a"]
threads: int = 1
"""


@pytest.fixture
def described(tmp_path):
    """A folder like the repository, with one notebook."""
    (tmp_path / "notebooks/profiles").mkdir(parents=True)
    (tmp_path / "notebooks/profiles/laptop.yaml").write_text('"00": {}\n')
    (tmp_path / "notebooks/00_toy.py").write_text(TOY)
    return tmp_path


def profile(project: Path, text: str, name: str = "smoke") -> None:
    (project / f"notebooks/profiles/{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '"00": {stesp: 5}\n',
            r"smoke.yaml, line 1: notebook 00_toy has no parameter 'stesp'; the closest is 'steps'",
        ),
        (
            '"00":\n  scale: 2\n  steps: 1.5\n',
            r"smoke.yaml, line 3: notebook 00_toy expects steps: int, found 1.5",
        ),
        ('"00": {steps: true}\n', r"expects steps: int, found True"),
        ('"00": {scale: fast}\n', r"expects scale: float, found 'fast'"),
        ('"00": {kinds: [a, 1]}\n', r"expects kinds: list\[str\], found"),
        ('"00": {kinds: a}\n', r"expects kinds: list\[str\], found 'a'"),
        ('"00": 3\n', r"smoke.yaml, line 1: expected a mapping of parameters"),
        ("- 1\n", r"smoke.yaml, line 1: expected a mapping of notebooks"),
        (
            "steps: 1\n",
            r"""smoke.yaml, line 1: expected a notebook's number such as "00", found 'steps'""",
        ),
        ('"00": {steps: 1}\n"01": {}\n"00": {}\n', r"smoke.yaml, line 3: 00 is there twice"),
        ('"00": {steps: 1\n', r"smoke.yaml, line 2: not valid YAML"),
    ],
)
def test_a_broken_profile_is_an_error_with_file_and_line(described, capsys, text, message):
    profile(described, text)
    with pytest.raises(ValueError, match=message):
        check_profile(described, "smoke")
    assert main(["--profile", "smoke"], described) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (described / "figures").exists()


def test_a_profile_that_is_not_text(described):
    (described / "notebooks/profiles/smoke.yaml").write_bytes(b'"00": {kinds: [\xff]}')
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        load_profile(described, "smoke")


def test_good_profiles(described):
    profile(described, '"00": {steps: 3, scale: 1e-3, kinds: [b, c]}\n"09": {x: 1}\n')
    assert check_profile(described, "smoke") == {"00": {"scale": 0.001, "kinds": ["b", "c"]}}
    profile(described, "")
    assert check_profile(described, "smoke") == {"00": {}}
    profile(described, "00:\n")
    assert check_profile(described, "smoke") == {"00": {}}
    profile(described, '"00": {steps: 3}\n', "laptop")
    assert check_profile(described, "laptop") == {"00": {}}
    profile(described, '"00": {steps: 4}\n', "laptop")
    with pytest.raises(ValueError, match="make them equal"):
        check_profile(described, "laptop")


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (None, "str | None", True),
        (1, "str | None", False),
        ([1, 2.5], "list[float]", True),
        ([[1]], "list[list]", True),
        (1, "", True),
        ({}, "dict[str, int]", True),
        ((1, 2), "tuple[int, ...]", True),
        ([None], "list[str | None] | None", True),
    ],
)
def test_type_hints(value, hint, fits):
    assert _fits(value, hint) is fits


def test_unknown_names_list_what_there_is(described, capsys):
    with pytest.raises(FileNotFoundError, match="no profile 'x': expected one of laptop"):
        load_profile(described, "x")
    with pytest.raises(FileNotFoundError, match="no notebook 07: expected one of 00"):
        find_notebooks(described, "07")
    assert [each.name for each in find_notebooks(described, "00")] == ["00_toy"]
    assert main(["--list"], described) == 0
    assert "steps: int = 3" in capsys.readouterr().out


def test_parameters_must_be_literals(described):
    (described / "notebooks/00_toy.py").write_text(
        TOY.replace("steps: int = 3", "steps: int = 3 + len('a')")
    )
    with pytest.raises(ValueError, match="00_toy.py: the cell tagged `parameters` has the line"):
        check_profile(described, "laptop")


@pytest.mark.parametrize("profile", PROFILES)
def test_notebook_04_reuses_the_runs_of_notebook_03(profile):
    """What both have as a parameter is the same in both, or 04 would train everything anew."""
    changed = check_profile(ROOT, profile)
    values = {}
    for number in ("03", "04"):
        (notebook,) = find_notebooks(ROOT, number)
        values[number] = {
            name: parameter.default for name, parameter in notebook.parameters().items()
        } | changed[number]
    shared = values["03"].keys() & values["04"].keys()
    assert {
        "variants",
        "lrs",
        "tuning_points",
        "same_lr",
        "d_sae",
        "steps",
        "seeds",
        "test_rows",
    } <= shared
    assert {name: values["03"][name] for name in shared} == {
        name: values["04"][name] for name in shared
    }
