"""The report: one HTML page that holds all that it shows."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from finetuning.report import run_metrics as figures
from finetuning.report.charts import timeline
from finetuning.report.run_folder import Run, parse_time, read_run
from finetuning.report.wording import shortened

FILE_NAME = "report.html"
logger = logging.getLogger(__name__)

_STATUS_KINDS = {"completed": "good", "running": "busy", "interrupted": "warn"}
_MOST_JOBS = 5


def write_report(folder: Path, compared: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Writes the report of a run, beside it or to `output`, and returns its path.

    Args:
        compared: output directories of other runs, whose curves and settings stand beside this one's.

    Raises:
        ConfigError: a directory holds no run.
        OSError: the page cannot be written.
    """
    path = output or folder / FILE_NAME
    text = render([read_run(one) for one in (folder, *compared)])
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
    return path


def write_report_if_possible(folder: Path) -> Path | None:
    """`write_report` at the end of a run, where a fault is one warning."""
    try:
        return write_report(folder)
    except Exception as error:  # noqa: BLE001  a run that has trained does not fail over its report
        logger.warning("no report could be made: %s: %s", type(error).__name__, error)
        return None


def render(runs: Sequence[Run]) -> str:
    """The page of the first run, with the others beside it."""
    run = runs[0]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.jinja").read_text(encoding="utf-8"))
    record = run.record
    jobs = record.get("jobs") or []
    started = parse_time(jobs[-1].get("started")) if jobs else None
    return template.render(
        run=run,
        runs=runs,
        title=title_of(run),
        status=record.get("status", "unknown"),
        status_kind=_STATUS_KINDS.get(str(record.get("status")), "bad"),
        error=record.get("error"),
        jobs=len(jobs),
        started=f"{started:%Y-%m-%d %H:%M:%S} UTC" if started else None,
        figures=[figures.key_figures(one) for one in runs],
        charts=figures.main_charts(runs),
        others=figures.other_charts(runs),
        timelines=[drawn for job in run.jobs[-_MOST_JOBS:] if (drawn := timeline(job))],
        shares=figures.time_shares(run),
        session=figures.session_of(run),
        ledger=(record.get("data") or {}).get("ledger") or [],
        decisions=_decisions(record),
        warnings=record.get("warnings") or [],
        controlled=record.get("controlled") or [],
        proofs=_proofs(run),
        versions=_versions(record),
        differences=_differences(runs) if len(runs) > 1 else [],
    )


def title_of(run: Run) -> str:
    """What was trained with what."""
    model = Path(str((run.record.get("model") or {}).get("name") or "")).name
    return " · ".join(part for part in (str(run.record.get("method") or ""), model) if part) or run.name


def _decisions(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was decided, and why: as the start summary told it, or what the plan alone says."""
    told = record.get("told")
    if told:
        return [(str(label), shortened(str(value), 400), str(reason)) for label, value, reason in told]
    plan = record.get("plan") or {}
    batch, steps = plan.get("batch") or {}, plan.get("steps") or {}
    rows = [
        ("total batch", batch.get("total"), "processes x per-device rows x accumulation"),
        ("per-device batch", batch.get("per_device"), batch.get("reason")),
        ("learning rate", plan.get("learning_rate"), plan.get("learning_rate_reason")),
        ("optimizer steps", steps.get("total"), steps.get("reason")),
    ]
    return [(label, str(value), str(reason or "")) for label, value, reason in rows if value is not None]


def _proofs(run: Run) -> list[tuple[str, str]]:
    """What was made of the run, and what was shown of it."""
    artifact = run.record.get("artifact") or {}
    proofs = [(str(artifact.get("kind")), str(artifact.get("folder")))] if artifact else []
    proofs += [("checked", check) for check in artifact.get("checks") or []]
    if artifact.get("stop_tokens"):
        proofs.append(("stops at", artifact["stop_tokens"]))
    for key in ("fingerprint", "layout"):
        if found := (run.record.get("model") or {}).get(key):
            proofs.append(({"fingerprint": "base model", "layout": "rows in a batch"}[key], str(found)))
    if found := (run.record.get("data") or {}).get("fingerprint"):
        proofs.append(("data fingerprint", str(found)))
    for path, certificate in run.certificates.items():
        passed = "passed" if certificate.get("passed") else "failed"
        numbers = ", ".join(f"{key} {value}" for key, value in flat(certificate).items() if isinstance(value, float))
        proofs.append((path, f"{passed}: {numbers}"))
    return proofs


def _versions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    job = (record.get("jobs") or [{}])[-1]
    versions = [("engine", str(record.get("engine", ""))), ("Python", str(job.get("python", "")))]
    versions += [(name, str(version)) for name, version in (job.get("packages") or {}).items()]
    return [(name, version) for name, version in versions if version]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys of the configs that are not the same in all runs, with the value of each."""
    from finetuning.config.yaml.reader import parse_document

    configs = [flat(parse_document(run.config).values) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [_shown(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists by dotted keys.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c.0': 2}
    """
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
