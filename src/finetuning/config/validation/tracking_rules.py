"""What must hold of `tracking` and of `training_args.report_to`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.trackers import reported_to, wanted_trackers
from finetuning.config.yaml.findings import Finding

_USER_INFO = re.compile(r"^[\w+.-]+://[^/?#]*@")


def tracking_address_holds_no_password(run: Experiment) -> Iterator[Finding]:
    """A user or password in the tracking address, which ends up in logs."""
    uri = run.tracking.mlflow_server_uri if run.tracking else None
    if has_user_info(uri):
        yield Finding(
            ("tracking", "mlflow_server_uri"),
            "holds a user name or password.",
            "Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        )


def trackers_have_a_place(run: Experiment) -> Iterator[Finding]:
    """Aim without a repository or with two, and `all`, which would tell whatever happens to be installed."""
    if "all" in reported_to(run.training_args.report_to):
        yield Finding(("training_args", "report_to"), "must name its trackers; all is none.", "Write [tensorboard].")
    if "aim" not in wanted_trackers(run):
        return
    tracking = run.tracking
    places = [tracking.aim_repo, tracking.aim_remote_server_ip] if tracking else []
    if len([place for place in places if place]) != 1:
        yield Finding(
            ("tracking", "trackers") if tracking and "aim" in tracking.trackers else ("training_args", "report_to"),
            "holds aim, which needs either tracking.aim_repo or tracking.aim_remote_server_ip.",
        )


def has_user_info(uri: str | None) -> bool:
    """Whether an address holds `user@` or `user:password@`.

    >>> has_user_info("http://me:pw@host"), has_user_info("http://host/a@b"), has_user_info(None)
    (True, False, False)
    """
    return bool(uri and _USER_INFO.match(uri))
