"""Known weaknesses of the exact packages in constraints.txt, by pip-audit.

pip-audit ends with 0 and "No known vulnerabilities found" where it could look up no package at all, so its report is
counted here. Ends with 1 when a weakness is known; with 0, but saying so, when the service could not be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = ("--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--timeout", "10", "--format", "json")


def judged(packages: list[dict[str, Any]]) -> tuple[str, int]:
    """What is to be said of a report's packages, and the exit code."""
    skipped = [one for one in packages if "skip_reason" in one]
    weak = [
        f"{one['name']} {one['version']}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or 'none'}"
        for one in packages
        for weakness in one.get("vulns", ())
    ]
    asked = len(packages) - len(skipped)
    lines = [*weak, f"{asked} of {len(packages)} packages were looked up, {len(weak)} weaknesses are known"]
    if skipped:
        shown = ", ".join(one["name"] for one in skipped[:5]) + (", …" if len(skipped) > 5 else "")
        lines.append(f"NOT AUDITED: {len(skipped)} packages, which the service does not know or was not asked: {shown}")
    return "\n".join(lines), 1 if weak else 0


def main() -> int:
    result = subprocess.run(
        [sys.executable, "-m", "pip_audit", *COMMAND], capture_output=True, text=True, check=False, timeout=900
    )
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = result.stderr.strip().splitlines() or ["no output"]
        print(f"NOT AUDITED: the service could not be asked: {lines[-1]}")
        return 0
    text, code = judged(packages)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
