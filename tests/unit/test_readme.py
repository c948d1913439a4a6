"""What README, pages and messages state and can be computed or looked up."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def memory_table(what: str) -> str:
    script = [sys.executable, str(ROOT / "launch" / "bench" / "memory_table.py"), what]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("what", ["state", "plans"])
def test_memory_tables_are_the_computed_ones(what: str) -> None:
    table = memory_table(what)
    readme = (ROOT / "README.md").read_text()
    wanted = f"<!-- --8<-- [start:{what}] -->\n{table}<!-- --8<-- [end:{what}] -->"
    assert wanted in readme, f"run python launch/bench/memory_table.py {what} and paste its output:\n{table}"


def test_page_of_plans_is_the_computed_one() -> None:
    page = (ROOT / "launch" / "bench" / "results" / "MEMORY.md").read_text()
    assert memory_table("page") == page, "run python launch/bench/memory_table.py page > launch/bench/results/MEMORY.md"


def test_no_message_installs_this_package_from_an_index() -> None:
    """It is on none; and a requirement of torch could replace the torch that is there."""
    files = [path for room in ("microadam_dist", "launch") for path in (ROOT / room).rglob("*") if path.is_file()]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    by_name = re.compile(rb"pip install[^`\n]*\bmicroadam[-_]dist(?!-[\d.]+-py3)")
    assert not [path for path in files if path.suffix != ".pyc" and by_name.search(path.read_bytes())]


def test_tested_versions_are_those_of_the_constraints() -> None:
    page = (ROOT / "launch" / "site" / "pages" / "index.md").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE))
    stated = {
        "torch": rf"\| torch \| {pinned['torch']} on CPUs",
        "deepspeed": rf"\| DeepSpeed \| {pinned['deepspeed']} \|",
        "hf": rf"\| Transformers, Accelerate \| {pinned['transformers']}, {pinned['accelerate']} \|",
        "tools": rf"\| Lightning, TRL, PEFT \| {pinned['lightning']}, {pinned['trl']}, {pinned['peft']} \|",
    }
    assert [name for name, pattern in stated.items() if not re.search(pattern, page)] == []


def test_long_description_has_no_links_into_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a build runs
    text = runpy.run_path(".ci/long_description.py")["dynamic_metadata"]("readme", {})["text"]
    assert set(re.findall(r"\]\((\w+:)?", text)) == {"https:"}
    assert memory_table("state") in text and "--8<--" not in text


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the pages are checked where the site is built."""
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]+)(?:#([^)]*))?\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file(), path
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor
