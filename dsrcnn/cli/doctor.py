"""``dsrcnn doctor``: the installation, its problems and their cures."""

import argparse
import json
from collections.abc import Sequence

from ..analysis.environment import Check, inspect_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print all checks; returns 1 if there are problems."""
    checks = inspect_environment()
    print(to_json(checks) if args.json else to_text(checks))
    return int(any(check.status == "problem" for check in checks))


def to_json(checks: Sequence[Check]) -> str:
    """Make JSON of the number of problems and all checks."""
    problems = sum(check.status == "problem" for check in checks)
    content = {"problems": problems, "checks": [check._asdict() for check in checks]}
    return json.dumps(content, indent=2)


def to_text(checks: Sequence[Check]) -> str:
    """List all checks, then what to do: notes first, problems last."""
    width = max(len(check.name) for check in checks) + 2
    lines = [f"{check.name:<{width}}{check.text}" for check in checks]
    for status in ("note", "problem"):
        cures = [c for c in checks if c.status == status and (c.cure or status == "problem")]
        if cures:
            lines.append("")
        lines += [f"{status}: {c.name}: {c.text}. {c.cure}".rstrip() for c in cures]
    if not any(check.status == "problem" for check in checks):
        lines += ["", "No problems."]
    return "\n".join(lines)
