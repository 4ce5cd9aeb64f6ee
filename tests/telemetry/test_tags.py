"""The five scenarios of One Logger's documentation: which tags change and which do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    changed = [
        tag(config={"training_args": {"output_dir": "a", "bf16": False}}),
        tag(model="other"),
        tag(versions={"torch": "3"}),
        tag(device="A100"),
        tag(world_size=4),
    ]
    assert len({tag(), *changed}) == 6


def test_the_perf_tag_depends_on_the_shape_of_the_model_not_its_path(tmp_path: Path) -> None:
    for name, layers in (("a", 2), ("b", 2), ("c", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "_name_or_path": name}))
    first, second, third = (perf_tag({}, str(tmp_path / name), {}, "cpu", 1) for name in "abc")
    assert first == second != third
