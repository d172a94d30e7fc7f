"""What requirements.txt names can be installed on every Python that the README promises."""

import re
import sys
from importlib.metadata import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OLDEST = "3.10"
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINNED = [Requirement(line.split("#")[0]) for line in LINES if line.split("#")[0].strip()]
HERE = {"python_version": f"{sys.version_info.major}.{sys.version_info.minor}"}


def test_the_readme_promises_the_oldest_python():
    assert f"Python {OLDEST} or later" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_package_is_named_exactly_once_for_each_python():
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": version}
        names = [each.name for each in PINNED if each.marker is None or each.marker.evaluate(environment)]
        assert sorted(names) == sorted({each.name for each in PINNED})
    assert all(re.fullmatch(r"==[\d.]+", str(each.specifier)) for each in PINNED)


@pytest.mark.parametrize("requirement", [each for each in PINNED if each.marker is None or each.marker.evaluate(HERE)])
def test_a_package_for_all_pythons_supports_the_oldest(requirement):
    """What is installed here knows which Pythons it is for."""
    installed = metadata(requirement.name)
    assert installed["Version"].split("+")[0] in requirement.specifier
    oldest_named = requirement.marker is None or requirement.marker.evaluate({"python_version": OLDEST})
    if oldest_named:
        assert OLDEST in SpecifierSet(installed["Requires-Python"])
