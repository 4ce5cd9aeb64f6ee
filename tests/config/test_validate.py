from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from finetuning.config.sections.experiment import EXPERIMENTS, DPOExperiment, GenerationConfig, SFTExperiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError

Messages = Callable[..., list[str]]
Changed = Callable[..., str]


def test_a_small_config_is_right(check: Callable, sft_text: str) -> None:
    validated = check(sft_text)
    assert isinstance(validated.experiment, SFTExperiment)
    assert validated.experiment.run_conf.final_checkpoint_name == "checkpoint-final"
    assert validated.warnings == []


def test_an_empty_file_names_what_is_required() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(parse_document("# nothing\n", "config.yaml"), SFTExperiment)
    assert str(caught.value) == ("config.yaml: is empty; required: data_conf, training_args, batchsize_conf, peft_conf")


def test_all_problems_at_once_in_the_files_order(messages: Messages) -> None:
    lines = messages(
        """\
data_conf:
  training_data:
    type: CONCATENATE
    datasets: [{path: a.jsonl}]
  validation_data:
    typ: NONE
  chat_template_name: chatml
training_args:
  learning_rat: 1e-5
  weight_decay: -1
  adam_beta1: .nan
  seed: eight
  max_steps: true
  final_checkpoint_name: x
batchsize_conf:
  total_train_batch_size: 0
run_conf:
  modl: /m
  final_checkpoint_name: ../up
peft_config:
  peft_type: LORA
"""
    )
    assert lines == [
        'config.yaml:3:5: data_conf.training_data.type: unknown type "CONCATENATE";'
        ' one of: CONCATENATION, PRECOMPUTE_WEIGHTED_MIX. Did you mean "CONCATENATION"?',
        'config.yaml:6:5: data_conf.validation_data.typ: unknown key. Did you mean "type"?',
        "config.yaml:7:3: data_conf.chat_template_name: must be one of mistral-with-system, chat-ml, poro,"
        ' simplified-llama31, keep-original (got "chatml"). Did you mean "chat-ml"?',
        'config.yaml:9:3: training_args.learning_rat: unknown key. Did you mean "learning_rate"?',
        "config.yaml:10:3: training_args.weight_decay: must be >= 0 (got -1)",
        "config.yaml:11:3: training_args.adam_beta1: must be a finite number (got nan)",
        'config.yaml:12:3: training_args.seed: expected a whole number (got "eight")',
        "config.yaml:13:3: training_args.max_steps: expected a number (got true)",
        "config.yaml:14:3: training_args.final_checkpoint_name: unknown key. It belongs under run_conf.",
        "config.yaml:15:1: batchsize_conf.max_per_device_train_batch_size: is required, but missing",
        "config.yaml:16:3: batchsize_conf.total_train_batch_size: must be > 0 (got 0)",
        'config.yaml:18:3: run_conf.modl: unknown key. Did you mean "model"?',
        "config.yaml:19:3: run_conf.final_checkpoint_name: must be the name of one folder:"
        ' letters, digits, dots, dashes, underscores (got "../up")',
        'config.yaml:20:1: peft_config: unknown key. Did you mean "peft_conf"?',
    ]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"sft_arg": "{}"}, 'sft_arg: unknown key. Did you mean "sft_args"?'),
        ({"lr": "3"}, 'lr: unknown key. Did you mean "training_args.learning_rate"?'),
        ({"max_seq_length": "3"}, "max_seq_length: unknown key. It belongs under sft_args."),
        ({"lora_alpha": "3"}, "lora_alpha: unknown key. It belongs under peft_conf.peft_kwargs."),
        ({"dataloader_num_workers": "3"}, "dataloader_num_workers: unknown key. It belongs under training_args."),
        ({"run_conf": "{sft_args: {}}"}, "run_conf.sft_args: unknown key. It belongs at the top level."),
        ({"run_conf": "{datasets: []}"}, "run_conf.datasets: unknown key. It belongs under data_conf.training_data"),
        ({"tracking": "{tracking_uri: x}"}, 'tracking.tracking_uri: unknown key. Did you mean "mlflow_server_uri"?'),
        ({"peft_conf": "{peft_typ: LORA}"}, 'peft_conf.peft_typ: unknown key. Did you mean "peft_type"?'),
        ({"peft_conf": "{peft_type: NO_PEFT, r: 8}"}, "peft_conf.r: unknown key."),
        ({"quant_conf": "{load_in_4bit: true}"}, "quant_conf.quantization_type: is required, but missing; one of: "),
        ({"quant_conf": "{quantization_type: bits-and-byte}"}, 'Did you mean "bits-and-bytes"?'),
        ({"quant_conf": "[1]"}, "quant_conf: expected keys and values (got a list)"),
        ({"data_conf": ""}, "data_conf.training_data: is required, but missing"),
        ({"overrides": "{lr_multiplier: 0}"}, "overrides.lr_multiplier: must be > 0 (got 0)"),
        ({"overrides": "{lr_multiplier: .inf}"}, "overrides.lr_multiplier: must be a finite number (got inf)"),
        ({"overrides": "{lr_batch_size_scaling: square}"}, "must be one of none, sqrt, linear (got"),
        (
            {"training_args": "{logging_steps: 1.5}"},
            "must be a whole number of steps, or a fraction of all steps below 1",
        ),
        ({"training_args": "{report_to: [1]}"}, "training_args.report_to.0: expected text (got 1). Put it in quotes."),
        ({"training_args": "{report_to: 1}"}, "training_args.report_to: expected text or a list (got 1)"),
        ({"training_args": "{output_dir: ''}"}, "training_args.output_dir: must not be empty"),
        ({"tracking": "{experiment_name: 7}"}, "tracking.experiment_name: expected text (got 7). Put it in quotes."),
        ({"run_conf": "{final_checkpoint_name: ..}"}, "must be the name of a folder"),
        ({"method": "sfd"}, 'method: unknown method "sfd"; one of: sft, dpo'),
    ],
)
def test_each_message_appears_once(sections: dict[str, str], line: str, messages: Messages, changed: Changed) -> None:
    lines = messages(changed(**sections))
    assert len([result for result in lines if line in result]) == 1, lines


@pytest.mark.parametrize("typo", ["peft_typ: LORA", "peft_type: lora", "peft_type: LORA\npeft_kwarg: {r: 8}"])
def test_a_union_says_one_thing(typo: str, messages: Messages, changed: Changed) -> None:
    assert len(messages(changed(peft_conf=typo + "\n"))) == 1


def test_a_null_section_is_a_section_of_defaults(check: Callable, changed: Changed) -> None:
    text = changed(
        training_args="", run_conf="", overrides="", sft_args="", quant_conf="{quantization_type: no-quantization}"
    )
    assert check(text).experiment.training_args.learning_rate == 5e-5


def test_one_command_given_the_others_config(messages: Messages, changed: Changed, sft_text: str) -> None:
    beta = changed(training_args="{beta: 0.1}")
    assert messages(beta) == [
        "config.yaml:13:17: training_args.beta: this looks like a dpo config (has beta);"
        " run: finetuning dpo config.yaml"
    ]
    assert "has sync_ref_model" in messages(changed(training_args="{sync_ref_model: true}"))[0]
    sft = sft_text + "sft_args: {max_seq_length: 8}\n"
    assert messages(sft, "dpo") == [
        "config.yaml:15:1: sft_args: this looks like an sft config (has sft_args); run: finetuning sft config.yaml"
    ]
    assert messages("method: dpo\n" + sft_text) == [
        "config.yaml:1:1: method: this looks like a dpo config (method is dpo); run: finetuning dpo config.yaml"
    ]
    assert messages(changed(training_args="{max_length: 8}")) == [
        'config.yaml:13:17: training_args.max_length: unknown key. Did you mean "sft_args.max_seq_length"?'
    ]
    both = changed(training_args="{beta: 0.1}", sft_args="{max_seq_length: 8}")
    assert messages(both) == ["config.yaml:13:17: training_args.beta: unknown key."]


def test_the_table_of_configs_is_that_of_the_algorithms() -> None:
    from finetuning.algorithms import ALGORITHMS

    for name, method in ALGORITHMS.items():
        assert EXPERIMENTS[name] is method.experiment
        assert method.experiment.method_name == name


def test_the_method_may_be_written(check: Callable, sft_text: str) -> None:
    assert check("method: sft\n" + sft_text).experiment.method == "sft"
    assert isinstance(check("method: dpo\n" + sft_text, "dpo").experiment, DPOExperiment)


def test_words_for_booleans_and_strategies(check: Callable, changed: Changed) -> None:
    text = changed(training_args="{save_strategy: no, bf16: yes, gradient_checkpointing: off, logging_steps: 0.01}")
    args = check(text).experiment.training_args
    assert (args.save_strategy, args.bf16, args.gradient_checkpointing, args.logging_steps) == ("no", True, False, 0.01)


def test_silogens_idioms(check: Callable, changed: Changed) -> None:
    args = "{num_train_epochs: -1, max_steps: 20, report_to: [none], push_to_hub: false, use_cpu: true, run_name: x}"
    text = changed(
        training_args=args,
        tracking='{mlflow_server_uri: "file:///tmp/x", experiment_name: e, hf_mlflow_log_artifacts: "False"}',
        run_conf="{resume_from_checkpoint: auto, model_args: {attn_implementation: sdpa, use_cache: False}}",
        quant_conf="",
    )
    validated = check(text)
    assert validated.experiment.training_args.model_extra == {"push_to_hub": False, "use_cpu": True, "run_name": "x"}
    assert validated.experiment.tracking.hf_mlflow_log_artifacts is False


def test_no_message_shows_a_secret(messages: Messages, changed: Changed) -> None:
    text = changed(
        training_args="{hub_token: [hf_secret], learning_rat: 1}",
        run_conf="{model_args: {token: [hf_secret]}}",
        tracking="{mlflow_server_uri: 'http://me:hf_secret@host', api_key: hf_secret, password: hf_secret}",
    )
    lines = messages(text)
    assert len(lines) == 5
    assert "hf_secret" not in "\n".join(lines)
    (line,) = messages(changed(tracking="{mlflow_server_uri: 'http://me:hf_secret@host'}"))
    assert line == (
        "config.yaml:15:12: tracking.mlflow_server_uri: holds a user name or password."
        " Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    )


def test_very_many_problems_are_counted(messages: Messages, sft_text: str) -> None:
    lines = messages(sft_text + "".join(f"key{number}: 1\n" for number in range(3000)))
    assert len(lines) == 51
    assert lines[-1].startswith("config.yaml: and ")


def test_a_generation_config() -> None:
    text = (
        "prompt_conf: {type: open-input}\nmodel_conf: {model: m}\nhf_gen_params: {do_sample: yes, max_new_token: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        validate(parse_document(text, "g.yaml"), GenerationConfig)
    assert str(caught.value) == 'g.yaml:3:33: hf_gen_params.max_new_token: unknown key. Did you mean "max_new_tokens"?'
    config = validate(parse_document(text.replace("token:", "tokens:"), "g.yaml"), GenerationConfig).experiment
    assert config.hf_gen_params == {"do_sample": True, "max_new_tokens": 3}


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
from finetuning.config.yaml.reader import parse_document
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.dump import dump_yaml, provenance
from finetuning.config.sections.experiment import DPOExperiment
from finetuning.config.yaml.overrides import apply_overrides
import finetuning.config.schema.json_schema, finetuning.config.schema.reference, finetuning.config.sections.experiment
text = '''
data_conf: {training_data: {type: CONCATENATION, datasets: [{path: a}]}, validation_data: {type: NONE}}
training_args: {output_dir: o, dataloader_num_workers: 2, loss_type: ipo, optim: adafactor, report_to: wandb}
batchsize_conf: {total_train_batch_size: 8, max_per_device_train_batch_size: 2}
peft_conf: {peft_type: LORA, peft_kwargs: {r: 8}}
run_conf: {model: m, model_args: {use_kernels: false}}
'''
validated = validate(apply_overrides(parse_document(text, "c.yaml"), ["training_args.seed=3"]), DPOExperiment)
dump_yaml(validated.experiment), provenance(validated.experiment, validated.document)
heavy = "torch transformers trl peft accelerate datasets mlflow numpy huggingface_hub tokenizers safetensors".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
