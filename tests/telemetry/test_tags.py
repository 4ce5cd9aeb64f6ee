"""The five scenarios of One Logger's documentation: which tags change and which do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from finetuning.config.sections.tracking import SpanName
from finetuning.telemetry import names
from finetuning.telemetry.session import new_job_id, perf_tag


@pytest.fixture
def tags(train: Any, sft_values: Any, tmp_path: Path) -> Any:
    """A function that runs a config and gives its session's tag and its performance's tag."""

    def run(output: str, changes: dict[str, Any] | None = None) -> tuple[str, str]:
        values = sft_values({"training_args.output_dir": str(tmp_path / output), **(changes or {})})
        trained = train(values)
        record = json.loads((trained.output_dir / "run.json").read_text())["telemetry"]
        return record["session_tag"], record["perf_tag"]

    return run


def test_scenario_1_another_model_changes_both(tags: Any, tiny_llama_dir: Path, chatml_llama_dir: Path) -> None:
    first = tags("a", {"run_conf.model": str(chatml_llama_dir)})
    second = tags("b", {"run_conf.model": str(tiny_llama_dir)})
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_scenario_2_other_resources_change_both(tags: Any) -> None:
    first = tags("a")
    second = tags("b", {"batchsize_conf.max_per_device_train_batch_size": 4})
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_scenario_3_the_same_config_is_a_new_session_of_equal_speed(tags: Any, tmp_path: Path) -> None:
    first = tags("a")
    second = tags("b", {"training_args.seed": 7, "training_args.learning_rate": 0.001})
    assert first[0] != second[0]
    assert first[1] == second[1]


RESUMED = {
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 2,
    "run_conf.resume_from_checkpoint": "auto",
}


def fail_first(train: Any, sft_values: Any, tmp_path: Path, monkeypatch: Any) -> str:
    """A run that fails at step 3, after its checkpoint at step 2; gives its session's tag."""
    from finetuning.trainer.mixin import TrainerMixin

    real = TrainerMixin.get_batch_samples

    def fails(self: Any, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("a small bug")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainerMixin, "get_batch_samples", fails)
        with pytest.raises(RuntimeError, match="small bug"):
            train(sft_values({"training_args.output_dir": str(tmp_path / "a"), **RESUMED}))
    return json.loads((tmp_path / "a" / "run.json").read_text())["telemetry"]


def test_scenario_4_a_resumed_run_keeps_both(
    train: Any, sft_values: Any, tags: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    first = fail_first(train, sft_values, tmp_path, monkeypatch)
    second = tags("a", RESUMED)
    assert second == (first["session_tag"], first["perf_tag"])
    session = json.loads((tmp_path / "a" / "run.json").read_text())["telemetry"]["session"]
    assert (session["jobs"], session["disruptions"], session["kept_steps"]) == (2, 1, 3)


def test_scenario_5_a_faster_resumed_run_keeps_the_session_alone(
    train: Any, sft_values: Any, tags: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    first = fail_first(train, sft_values, tmp_path, monkeypatch)
    second = tags("a", {**RESUMED, "telemetry": {"perf_tag": "without the needless loop"}})
    assert second == (first["session_tag"], "without the needless loop")


def test_longer_rows_change_the_perf_tag_and_logging_does_not(tags: Any, tmp_path: Path, sft_values: Any) -> None:
    rows = Path(sft_values()["data_conf"]["training_data"]["datasets"][0]["path"]).read_text().splitlines()
    long = []
    for row in map(json.loads, rows):
        row["messages"][-1]["content"] *= 6
        long.append(json.dumps(row))
    (tmp_path / "long.jsonl").write_text("\n".join(long) + "\n")
    first = tags("a")[1]
    assert tags("b", {"training_args.logging_steps": 3, "training_args.save_steps": 3})[1] == first
    assert tags("c", {"data_conf.training_data.datasets": [{"path": str(tmp_path / "long.jsonl")}]})[1] != first


def test_perf_tags_may_be_several_and_metadata_numbers(tags: Any, recorded: Any, tmp_path: Path) -> None:
    section = {"perf_tag": ["a100", "bf16"], "custom_metadata": {"nodes": 2, "preempted": False}}
    assert tags("a", {"telemetry": section})[1] == ["a100", "bf16"]
    config = recorded(tmp_path / "a").event("update_training_telemetry_config")
    assert config["perf_tag"] == ["a100", "bf16"]
    assert config["custom_metadata"] == ["nodes:2", "preempted:False"]


def test_the_config_has_the_names_of_all_standard_spans() -> None:
    assert frozenset(get_args(SpanName)) == names.STANDARD_SPANS


def test_job_ids_of_one_second_sort_in_order() -> None:
    jobs = [new_job_id() for _ in range(50)]
    assert jobs == sorted(set(jobs))


def test_the_user_may_set_both_tags(tags: Any) -> None:
    assert tags("a", {"telemetry": {"session_tag": "s", "perf_tag": "p"}}) == ("s", "p")


def test_the_default_perf_tag_depends_on_what_determines_the_speed(tmp_path: Path) -> None:
    base = ({"training_args": {"output_dir": "a", "bf16": True}}, "model", {"torch": "2"}, "H100", 8)

    def tag(**changes: Any) -> str:
        names = ("config", "model", "versions", "device", "world_size")
        return perf_tag(*({**dict(zip(names, base, strict=True)), **changes}[name] for name in names))

    assert tag(config={"training_args": {"output_dir": "b", "bf16": True, "seed": 3}}) == tag()
    neutral = {
        "logging_steps": 7,
        "save_steps": 3,
        "save_total_limit": 1,
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    assert tag(config={"training_args": {**base[0]["training_args"], **neutral}}) == tag()
    changed = [
        tag(config={"training_args": {"output_dir": "a", "bf16": False}}),
        tag(model="other"),
        tag(versions={"torch": "3"}),
        tag(device="A100"),
        tag(world_size=4),
    ]
    assert len({tag(), *changed}) == 6
    # Another random half of the same rows has the same tag, rows of twice the length have not.
    assert perf_tag(*base, 100.0) == perf_tag(*base, 103.0) != perf_tag(*base, 200.0)


def test_the_perf_tag_depends_on_the_shape_of_the_model_not_its_path(tmp_path: Path) -> None:
    for name, layers in (("a", 2), ("b", 2), ("c", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "_name_or_path": name}))
    first, second, third = (perf_tag({}, str(tmp_path / name), {}, "cpu", 1) for name in "abc")
    assert first == second != third
