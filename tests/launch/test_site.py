"""The documentation site is built without a warning, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.runs import ROOT

pytest.importorskip("material", reason="needs the docs extra, on Python 3.11 or newer")
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def test_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(
        [*build, "--config-file", str(ROOT / "launch" / "site" / "mkdocs.yml")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "api.html", "repository/launch/studies/results/RESULTS.html"} <= pages.keys()
    assert {name: LOADED.findall(page) for name, page in pages.items() if LOADED.search(page)} == {}
