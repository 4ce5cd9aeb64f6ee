from __future__ import annotations

from collections.abc import Callable

import pytest

from finetuning.config.sections.experiment import SFTExperiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.overrides import apply_overrides
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError


def overridden(*overrides: str) -> dict[str, object]:
    return apply_overrides(parse_document("a: {b: 1}\nl: [x, {y: 2}]\nn:\nm: {0: z}\n"), overrides).values


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("a.b=1e-3", ("a", "b"), 1e-3),
        ("a.c=[1, no]", ("a", "c"), [1, "no"]),
        ("a.c={d: 1}", ("a", "c", "d"), 1),
        ("a.c=", ("a", "c"), None),
        ("a.c=x=y", ("a", "c"), "x=y"),
        ("new.key.deep=5", ("new", "key", "deep"), 5),
        ("n.o=true", ("n", "o"), True),
        ("l.1.y=3", ("l", 1, "y"), 3),
        ("l.2=last", ("l", 2), "last"),
        ("m.0=w", ("m", 0), "w"),
        ("a=5", ("a",), 5),
    ],
)
def test_overrides_set_one_value(override: str, path: tuple[str | int, ...], value: object) -> None:
    document = apply_overrides(parse_document("a: {b: 1}\nl: [x, {y: 2}]\nn:\nm: {0: z}\n", "f.yaml"), [override])
    assert document.get(path) == value
    assert document.origin_of(path) == "command line"
    assert document.origin_of(("l", 0)) == "f.yaml:2"


def test_the_last_override_wins_and_the_document_stays() -> None:
    document = parse_document("a: {b: 1}\n", "f.yaml")
    assert apply_overrides(document, ["a.b=2", "a.b=3"]).values == {"a": {"b": 3}}
    assert document.values == {"a": {"b": 1}}


def test_an_alias_is_changed_in_one_place_only() -> None:
    document = apply_overrides(parse_document("a: &a {x: 1}\nb: *a\n"), ["b.x=2"])
    assert document.values == {"a": {"x": 1}, "b": {"x": 2}}


def test_all_wrong_overrides_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        overridden("a.b.c=1", "a", "l.9=1", "l.x=1", "a.b=[1", "a..b=2", "run.token=[hf_abc")
    assert [str(problem) for problem in caught.value.problems] == [
        'command line "a.b.c=1": "a.b" is a value, not a section',
        'command line "a": expected key.path=value',
        'command line "l.9=1": "l" has items 0 to 1; "9" is none of them',
        'command line "l.x=1": "l" has items 0 to 1; "x" is none of them',
        "command line \"a.b=[1\": the value is not YAML: did not find expected ',' or ']',"
        " while parsing a flow sequence that begins at line 1",
        'command line "a..b=2": expected key.path=value',
        'command line "run.token=…": the value is not YAML',
    ]


def test_a_typo_in_an_override_gets_the_same_help(sft_text: str) -> None:
    overrides = ["training_args.learning_rat=1e-5", "run_conf.modl=x", "tracking.mlflow_server_uri=http://u:pw@h"]
    with pytest.raises(ConfigError) as caught:
        validate(apply_overrides(parse_document(sft_text, "config.yaml"), overrides), SFTExperiment)
    lines = [str(problem) for problem in caught.value.problems]
    assert (
        'command line "training_args.learning_rat=1e-5": training_args.learning_rat: unknown key.'
        ' Did you mean "learning_rate"?' in lines
    )
    assert 'command line "run_conf.modl=x": run_conf.modl: unknown key. Did you mean "model"?' in lines
    assert not any("pw" in line for line in lines)
    assert any("holds a user name or password" in line for line in lines)


def test_values_are_checked_like_the_files(sft_text: str, messages: Callable[..., list[str]]) -> None:
    document = apply_overrides(parse_document(sft_text, "config.yaml"), ["training_args.weight_decay=-1"])
    with pytest.raises(ConfigError, match=r"must be >= 0 \(got -1\)"):
        validate(document, SFTExperiment)
