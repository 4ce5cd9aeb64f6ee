#!/usr/bin/env python3
"""Keeps the torch that the vendor's image brought, whatever pip installs on top of it.

The vendor's build is made for its driver stack, often carries a version that no index has, and is gone for good once
pip has replaced it. Three steps, in this order, in one image build:

    keep_vendor_torch.py record STATE --build cuda|hip    write down what the vendor installed
    keep_vendor_torch.py pin CONSTRAINTS                  print constraints for pip that hold pip to it
    keep_vendor_torch.py check STATE                      fail unless all of it is still there, byte for byte

Only the standard library is used: this runs before anything of ours is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

# What torch brings along or is linked against: a foreign build of any of these breaks the vendor's.
VENDOR = re.compile(
    r"(torch|torchvision|torchaudio|apex|flash-attn|amdsmi)|(pytorch-)?triton(-.+)?|(nvidia|cuda|rocm)(-.+)?"
)


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def vendor_packages() -> dict[str, Distribution]:
    """The installed distributions that belong to the vendor's torch, by canonical name.

    Raises:
        SystemExit: torch is not installed.
    """
    packages: dict[str, Distribution] = {}
    for distribution in distributions():
        name = canonical(distribution.metadata["Name"])
        if VENDOR.fullmatch(name):
            packages.setdefault(name, distribution)
    if "torch" not in packages:
        raise SystemExit("keep_vendor_torch: no torch is installed here; the base image must bring the vendor's build")
    return dict(sorted(packages.items()))


def build_of(torch: Distribution) -> str:
    """`cuda 13.0`, `hip 7.14` or `cpu`, as torch's own version file says; torch itself is not imported."""
    version = runpy.run_path(str(torch.locate_file("torch/version.py")))
    kinds = [f"{kind} {version[kind]}" for kind in ("hip", "cuda") if version.get(kind)]
    return kinds[0] if kinds else "cpu"


def fingerprint(distribution: Distribution) -> dict[str, str]:
    """Version, place and a SHA-256 of the installation record, which lists a hash of every file of the build."""
    record = distribution.read_text("RECORD") or ""
    return {
        "version": distribution.version,
        "location": str(distribution.locate_file("")),
        "record_sha256": hashlib.sha256(record.encode()).hexdigest(),
    }


def damaged_files(distribution: Distribution) -> list[str]:
    """Files of the distribution that are missing or no longer as long as its record says."""
    damaged = []
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if file.size is not None and (not path.is_file() or path.stat().st_size != file.size):
            damaged.append(str(path))
    return damaged


def state() -> dict[str, object]:
    """What the vendor installed: the kind of build, and each package's fingerprint."""
    packages = vendor_packages()
    return {
        "build": build_of(packages["torch"]),
        "packages": {name: fingerprint(distribution) for name, distribution in packages.items()},
    }


def limited_by_vendor(packages: dict[str, Distribution]) -> set[str]:
    """Packages that the vendor's own metadata gives an upper bound: our pin could contradict it."""
    limited = set()
    for distribution in packages.values():
        for requirement in distribution.requires or ():
            name, _, rest = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?(.*)", requirement, re.DOTALL).groups()
            if re.search(r"<|==|~=", rest.split(";")[0]):
                limited.add(canonical(name))
    return limited


def pins(constraints: str) -> str:
    """The constraints with the vendor's versions in place of ours, and without what the vendor limits itself."""
    packages = vendor_packages()
    replaced = set(packages) | limited_by_vendor(packages)
    kept = [
        line
        for line in constraints.splitlines()
        if line.strip() and not line.startswith("#") and canonical(re.split(r"[=<>!~;\s\[]", line)[0]) not in replaced
    ]
    vendor = [f"{name}=={distribution.version}" for name, distribution in packages.items()]
    return "\n".join([*vendor, *kept, ""])


def check(recorded: dict[str, dict]) -> list[str]:
    """What has changed since the record was made, one line each; empty when the vendor's build is intact."""
    packages = vendor_packages()
    problems = []
    if build_of(packages["torch"]) != recorded["build"]:
        problems.append(f"torch is now a {build_of(packages['torch'])} build, it was {recorded['build']}")
    for name, before in recorded["packages"].items():
        if name not in packages:
            problems.append(f"{name} {before['version']} is gone")
            continue
        after = fingerprint(packages[name])
        problems += [f"{name}: {key} was {before[key]}, is {after[key]}" for key in before if before[key] != after[key]]
        problems += [f"{name}: {path} is missing or was overwritten" for path in damaged_files(packages[name])[:3]]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    record = steps.add_parser("record", help="write down what the vendor installed")
    record.add_argument("state", type=Path)
    record.add_argument("--build", choices=["cuda", "hip", "cpu"], required=True, help="the build that torch must be")
    steps.add_parser("pin", help="print constraints for pip").add_argument("constraints", type=Path)
    steps.add_parser("check", help="fail unless the vendor's build is intact").add_argument("state", type=Path)
    arguments = parser.parse_args()

    if arguments.step == "pin":
        sys.stdout.write(pins(arguments.constraints.read_text(encoding="utf-8")))
        return 0
    if arguments.step == "record":
        now = state()
        if str(now["build"]).split()[0] != arguments.build:
            raise SystemExit(f"keep_vendor_torch: torch is a {now['build']} build, this image needs {arguments.build}")
        arguments.state.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return 0
    problems = check(json.loads(arguments.state.read_text(encoding="utf-8")))
    for problem in problems:
        sys.stderr.write(f"keep_vendor_torch: {problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
