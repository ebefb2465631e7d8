"""A chart's README: introduction (README.head.md), scenarios (ci/), and a table of all values from the comments in values.yaml.

python -m charts.readme charts/inference charts/mlflow      writes README.md of each
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w\"*.-]+):(?: |$)")


def documented(text: str) -> dict[str, str]:
    """Path of each value → what the comment `# -- …` above it says."""
    found: dict[str, str] = {}
    path: list[str] = []
    comment = ""
    for line in text.splitlines():
        if line.strip().startswith("# -- "):
            comment = line.strip()[5:]
        elif match := LINE.match(line):
            path = [*path[: len(match["indent"]) // 2], match["key"]]
            if comment:
                found[".".join(path)] = comment
            comment = ""
    return found


def leaves(values: dict[str, Any], told: dict[str, str], path: str = "") -> list[tuple[str, Any]]:
    """(path, default) of everything that is set by itself: what has a comment is one value, whatever it holds."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and here not in told:
            rows += leaves(value, told, here)
        else:
            rows.append((here, value))
    return rows


def readme(chart: Path) -> str:
    text = (chart / "values.yaml").read_text()
    told = documented(text)
    lines = [(chart / "README.head.md").read_text().rstrip(), "", "## Scenarios", ""]
    for scenario in sorted((chart / "ci").glob("*-values.yaml")):
        first = scenario.read_text().splitlines()[0]
        lines.append(f"- [{scenario.name}](ci/{scenario.name}): {first.removeprefix('# ')}")
    lines += ["", "## Values", "", "| value | default | meaning |", "| --- | --- | --- |"]
    for path, default in leaves(yaml.safe_load(text), told):
        meaning = told.get(path, "").replace("|", "\\|")
        lines.append(f"| `{path}` | `{json.dumps(default)}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name, "README.md").write_text(readme(Path(name)))
