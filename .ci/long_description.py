"""The README as an index shows it: a link into the repository, which leads nowhere there, becomes its text.

scikit-build-core calls it when it builds the package, see pyproject.toml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IMAGE_OR_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)[^)]*\)")
_MARK = re.compile(r"^<!-- --8<-- .*-->\n", re.MULTILINE)  # of the tables that pages include


def dynamic_metadata(field: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The ``readme`` of the project."""
    assert field == "readme" and not settings
    text = _IMAGE_OR_LINK.sub(lambda found: "" if found[1] else found[2], Path("README.md").read_text("utf-8"))
    return {"content-type": "text/markdown", "text": _MARK.sub("", text)}
