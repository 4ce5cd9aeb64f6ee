"""Look up known vulnerabilities of the exact packages in constraints.txt with pip-audit.

pip-audit ends with 0 and "No known vulnerabilities found" where it could look up no package at all, so its report is
counted here. Exits with 1 when a vulnerability is known, and with 0 and a message when the service is not reachable.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = ("--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--timeout", "10", "--format", "json")


def summarize(packages: list[dict[str, Any]]) -> tuple[str, int]:
    """Return the summary of a report's packages and the exit code."""
    skipped = [package for package in packages if "skip_reason" in package]
    vulnerable = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'none'}"
        for package in packages
        for vulnerability in package.get("vulns", ())
    ]
    looked_up = len(packages) - len(skipped)
    counts = f"{looked_up} of {len(packages)} packages were looked up, {len(vulnerable)} vulnerabilities are known"
    lines = [*vulnerable, counts]
    if skipped:
        names = ", ".join(package["name"] for package in skipped[:5]) + (", …" if len(skipped) > 5 else "")
        lines.append(f"NOT AUDITED: {len(skipped)} packages, unknown to the service or not looked up: {names}")
    return "\n".join(lines), 1 if vulnerable else 0


def main() -> int:
    result = subprocess.run(
        [sys.executable, "-m", "pip_audit", *COMMAND], capture_output=True, text=True, check=False, timeout=900
    )
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = result.stderr.strip().splitlines() or ["no output"]
        print(f"NOT AUDITED: the service could not be reached: {lines[-1]}")
        return 0
    text, code = summarize(packages)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
