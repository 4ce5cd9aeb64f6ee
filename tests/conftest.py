"""Fixtures that the tests of every package share: tiny seeded models, rows, JSONL files and the console scripts.

The tiny models are built once per worker, under pytest's temporary directory. Tests read them; a test that changes one
copies it first.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import SECONDS, ForkServer, wait_all

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "USE_HUB_KERNELS": "0",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "FINETUNING_CACHE": "off",
}
# Before any test module imports torch or transformers, which read these once.
os.environ.update(OFFLINE)
for _launcher_variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MLFLOW_TRACKING_URI", "CHECKPOINTS_PATH"):
    os.environ.pop(_launcher_variable, None)

# A shell starts its background jobs with SIGINT ignored, nohup its command with SIGHUP, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "The quick brown fox jumps over the lazy dog and runs into the forest.",
    "A conversation has a user who asks a question and an assistant who answers it.",
    "You are a helpful assistant. Answer in one short sentence, please.",
    "What is the capital of France? The capital of France is Paris.",
    "What is two plus two? Two plus two is four, and four plus four is eight.",
    "Colour names are red, green, blue, yellow, black and white.",  # row text
    "Training moves the weights of a model so that the loss becomes smaller step by step.",
    '{"name": "Ada", "age": 36, "city": "London", "likes": ["tea", "numbers"]}',
    "system user assistant tool role content name question answer number sentence",
)


def _train_tokenizer(special_tokens: Sequence[str]) -> Any:
    """A byte-level BPE of about 500 tokens as `tokenizers.Tokenizer`; the special tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=1,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def _save_tiny_llama(directory: Path, tokenizer: Any, *, tie_word_embeddings: bool, seed: int) -> None:
    """Writes a two-layer Llama of random float32 weights whose vocabulary is padded to a multiple of 8."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in the manner of Llama 2: <s> is put before each text, no pad token, no chat template, untied."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = _train_tokenizer(["<s>", "</s>", "<unk>"])
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    _save_tiny_llama(directory, tokenizer, tie_word_embeddings=False, seed=1)
    return directory


@pytest.fixture(scope="session")
def chatml_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model in the manner of Qwen: ChatML template, eos <|im_end|>, pad <|endoftext|>, no bos, tied."""
    from transformers import PreTrainedTokenizerFast

    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(special_tokens),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
        chat_template=CHATML_TEMPLATE,
    )
    directory = tmp_path_factory.mktemp("models") / "chatml-llama"
    _save_tiny_llama(directory, tokenizer, tie_word_embeddings=True, seed=2)
    return directory


@pytest.fixture(scope="session")
def gptq_llama_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Path:
    """`chatml_llama_dir` in 4 bit by GPTQ, as gptqmodel makes it. Its tests are skipped where that is not installed.

    The tests cannot ask for it: it holds numpy to 2.2.6, and comes with C code that has to be compiled.
    """
    for module in ("gptqmodel", "optimum"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'finetuning[gptq]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    rows = [sentence * 6 for sentence in SENTENCES]
    quantization = GPTQConfig(bits=4, group_size=32, dataset=rows, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir, quantization_config=quantization)
    directory = tmp_path_factory.mktemp("models") / "gptq-llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_tokenizer(tiny_llama_dir: Path) -> Any:
    """The tokenizer of `tiny_llama_dir`, freshly loaded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def chatml_tokenizer(chatml_llama_dir: Path) -> Any:
    """The tokenizer of `chatml_llama_dir`, freshly loaded."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chatml_llama_dir)


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Mapping[str, Any]]], Path]:
    """A function that writes rows, one JSON object a line, and gives the path back."""

    def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


_COLORS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="session")
def sft_rows() -> Callable[[int], list[dict[str, Any]]]:
    """A function that makes n different rows with `messages`: a system turn in each third, two exchanges in each
    fourth."""

    def make(count: int) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            color = _COLORS[number % len(_COLORS)]
            messages = [
                {"role": "user", "content": f"What is number {number}? Answer with a colour."},  # row text
                {"role": "assistant", "content": f"Number {number} is {color}."},
            ]
            if number % 3 == 0:
                messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
            if number % 4 == 0:
                messages += [
                    {"role": "user", "content": "Please answer in one word."},
                    {"role": "assistant", "content": color},
                ]
            rows.append({"messages": messages, "dataset": "colours", "id": f"row-{number}"})  # row text
        return rows

    return make


@pytest.fixture(scope="session")
def dpo_rows() -> Callable[[int], list[dict[str, Any]]]:
    """A function that makes n different rows with `prompt_messages`, `chosen_messages` and `rejected_messages`."""

    def make(count: int) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            good, bad = _COLORS[number % len(_COLORS)], _COLORS[(number + 1) % len(_COLORS)]
            rows.append(
                {
                    "prompt_messages": [{"role": "user", "content": f"What is number {number}?"}],
                    "chosen_messages": [{"role": "assistant", "content": f"Number {number} is {good}."}],
                    "rejected_messages": [{"role": "assistant", "content": f"It is {bad}, is it not?"}],
                    "dataset": "colours",  # row text
                    "id": f"pair-{number}",
                }
            )
        return rows

    return make


@pytest.fixture(scope="session")
def shared_fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The fork server of a worker: see `processes.py`."""
    fork_server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield fork_server
    fork_server.close()


@pytest.fixture
def fork_server(shared_fork_server: ForkServer) -> Iterator[ForkServer]:
    """Starts console scripts as processes that are gone when the test is."""
    yield shared_fork_server
    shared_fork_server.clear()


@pytest.fixture(scope="session")
def run_cli(request: pytest.FixtureRequest) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a console script of this package as a process of its own and returns its result.

    `run_cli(["sft", "config.yaml"])` runs `finetuning`; `program="merge_adapter"` another script. `env` adds to the
    environment; None removes a variable. After `timeout` seconds the process is killed and the test fails.

    The process is forked from a server that has imported the engine. `fresh=True` starts a new interpreter, which takes
    seconds: for scripts of other packages, and for what depends on the imports or on variables that they read.
    """

    def run(
        args: Sequence[str | os.PathLike[str]],
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str | None] | None = None,
        *,
        program: str = "finetuning",
        timeout: float = SECONDS,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        if not fresh:
            server: ForkServer = request.getfixturevalue("shared_fork_server")
            process = server.start(args, {**OFFLINE, **(env or {})}, program=program, cwd=cwd)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            return subprocess.CompletedProcess(process.args, code, process.stdout, process.stderr)
        script = Path(sys.executable).parent / program
        assert script.exists(), f"{script} is missing: install the package first"
        merged = {**os.environ, **OFFLINE, "PYTHONUNBUFFERED": "1", **(env or {})}
        return subprocess.run(
            [str(script), *map(os.fspath, args)],
            cwd=cwd,
            env={name: value for name, value in merged.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def torchrun(run_cli: Any, shared_fork_server: ForkServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that trains on several processes of this machine and expects success: `torchrun("sft", config)`.

    Returns what they wrote. There are two `processes` by default. They are forked, with the variables that torchrun
    sets; `fresh=True` runs torchrun itself.
    """

    def run(method: str, config: Path, processes: int = 2, *, fresh: bool = False) -> subprocess.CompletedProcess[str]:
        if fresh:
            rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
            program = Path(sys.executable).parent / "finetuning"
            command = ["--nproc_per_node", str(processes), *rendezvous, "--no-python", program, method, config]
            result = run_cli(command, env={"OMP_NUM_THREADS": "1"}, program="torchrun", fresh=True)
            assert result.returncode == 0, result.stderr
            return result
        ranks = shared_fork_server.start_all([method, config], [""] * processes, OFFLINE)
        codes = wait_all(ranks)
        stdout, stderr = ("".join(getattr(rank, name) for rank in ranks) for name in ("stdout", "stderr"))
        assert codes == [0] * processes, stderr
        return subprocess.CompletedProcess(ranks[0].args, 0, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def logged_losses() -> Callable[[Path], list[float]]:
    """A function that reads the losses of an output directory, training and validation, in the order of the log."""

    def read(output_dir: Path) -> list[float]:
        lines = (output_dir / "training_logs.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["data"]["value"] for line in lines]

    return read


Values = dict[str, Any]


def _changed(values: Values, changes: Mapping[str, Any]) -> Values:
    """The values with others at dotted paths; None takes a key out."""
    values = json.loads(json.dumps(values))
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(key, None)
        else:
            section[key] = value
    return values


@pytest.fixture
def sft_values(tmp_path: Path, chatml_llama_dir: Path, write_jsonl: Any, sft_rows: Any) -> Callable[..., Values]:
    """A function that makes the values of an SFT config that runs in a second: `sft_values({"run_conf.model": "m"})`.

    Its output directory is `tmp_path / "out"`.
    """
    rows = write_jsonl(tmp_path / "sft.jsonl", sft_rows(24))

    def make(changes: Mapping[str, Any] | None = None) -> Values:
        values = {
            "data_conf": {
                "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(rows)}]},
                "validation_data": {"type": "NONE"},
                "chat_template_name": "chat-ml",
            },
            "training_args": {
                "output_dir": str(tmp_path / "out"),
                "use_cpu": True,
                "learning_rate": 0.01,
                "max_steps": 3,
                "logging_steps": 1,
                "save_strategy": "no",
            },
            "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 2},
            "peft_conf": {"peft_type": "NO_PEFT"},
            "run_conf": {"model": str(chatml_llama_dir)},
            "sft_args": {"max_seq_length": 256, "train_on_completions_only": True},
        }
        return _changed(values, changes or {})

    return make


@pytest.fixture
def dpo_values(tmp_path: Path, sft_values: Any, write_jsonl: Any, dpo_rows: Any) -> Callable[..., Values]:
    """`sft_values` for DPO."""
    rows = write_jsonl(tmp_path / "dpo.jsonl", dpo_rows(12))

    def make(changes: Mapping[str, Any] | None = None) -> Values:
        local = {
            "sft_args": None,
            "data_conf.training_data.datasets": [{"path": str(rows)}],
            "training_args.learning_rate": 0.001,
            "training_args.max_length": 256,
        }
        return _changed(_changed(sft_values(), local), changes or {})

    return make


LETTERS = """
def letters(completions, **columns):
    return [float(len(set(completion[0]["content"]))) for completion in completions]
"""


@pytest.fixture
def grpo_values(tmp_path: Path, dpo_values: Any, write_jsonl: Any) -> Callable[..., Values]:
    """`sft_values` for GRPO, with the number of different letters as the reward."""
    (tmp_path / "letters.py").write_text(LETTERS)
    rows = [{"prompt_messages": [{"role": "user", "content": f"What is number {n}?"}]} for n in range(24)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)

    def make(changes: Mapping[str, Any] | None = None) -> Values:
        local = {
            "data_conf.training_data.datasets": [{"path": str(path)}],
            "training_args.max_length": None,
            "training_args.num_generations": 4,
            "training_args.max_completion_length": 8,
            "training_args.learning_rate": 0.01,
            "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4},
            "grpo_args": {"rewards": [{"type": "function", "path": f"{tmp_path}/letters.py:letters"}]},
        }
        return _changed(dpo_values(local), changes or {})

    return make


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes values as YAML, to `config.yaml` by default."""
    import yaml

    def write(values: Values, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Trained:
    """A run in this process: its end, its trainer, its output directory."""

    result: Any
    trainer: Any
    output_dir: Path

    @property
    def losses(self) -> list[float]:
        """The training loss at each log."""
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def final(self) -> Path:
        return self.output_dir / "checkpoint-final"


@pytest.fixture(scope="module", autouse=True)
def freeze_imports() -> None:
    """Take what exists so far out of garbage collection, as a run does with its imports.

    A run in this process collects garbage at its end. Looking at all objects of the imported libraries would take
    longer than the rest of a small run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def compare_refusals_with_dry_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test if a run in this process is refused before its first step, and a dry run of it is not."""
    import dry_run_refusals

    import finetuning.cli.train

    original = finetuning.cli.train.train

    def train(parse_options: Any, argv: Sequence[str], *arguments: Any, **options: Any) -> int:
        # Importing the libraries prints warnings, which these options must not.
        if not {"--dry-run", "--version", "--help"}.intersection(argv):
            dry_run_refusals.install()
        return original(parse_options, argv, *arguments, **options)

    monkeypatch.setattr(finetuning.cli.train, "train", train)
    dry_run_refusals.missed.clear()
    yield
    assert not dry_run_refusals.missed, "\n".join(dry_run_refusals.missed)


@pytest.fixture
def train(write_config: Any) -> Iterator[Callable[..., Trained]]:
    """A function that runs a config in this process: `train(values)`, `train(values, algorithm)`."""
    import dry_run_refusals
    import torch

    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking
    from finetuning.training.reporter import RunReporter

    dry_run_refusals.install()
    from finetuning.training.run import TrainingJob, run_training

    class KeepsTrainer(RunReporter):
        trainer: Any = None

        def trainer_built(self, trainer: Any, stop: Any) -> None:
            super().trainer_built(trainer, stop)
            self.trainer = trainer

    def start(values: Values, algorithm: Any = None) -> Trained:
        algorithm = algorithm or ALGORITHMS["sft" if "sft_args" in values else "dpo"]
        experiment = validate(read_document(write_config(values)), algorithm.experiment).experiment
        topology = ProcessTopology()
        tracking = resolve_tracking(TrackingOptions(None, None, None), experiment.tracking, {})
        reporter = KeepsTrainer(experiment, algorithm.name, topology, tracking)
        job = TrainingJob(experiment, algorithm, make_plan(experiment, topology), topology, reporter, workers=1)
        return Trained(run_training(job), reporter.trainer, job.output_dir)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield start
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, Any]]:
    """A function that reads all tensors of a model's or adapter's folder."""
    from safetensors.torch import load_file

    def read(folder: Path) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors

    return read


@dataclass
class ScriptedRun:
    """The result of a scripted training: the trainer's state, its error, and the checkpoints on disk."""

    state: Any
    checkpoints: list[str]
    error: BaseException | None


@pytest.fixture
def scripted_run(tmp_path: Path) -> Callable[..., ScriptedRun]:
    """A function that runs a transformers Trainer whose training and validation losses are prescribed."""

    def run(
        losses: list[float], callbacks: list[Any], *, validation: Sequence[float] = (), **arguments: Any
    ) -> ScriptedRun:
        import torch
        from transformers import Trainer, TrainingArguments

        from finetuning.errors import FinetuningError

        class Scripted(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))
                self.losses = {True: list(losses), False: list(validation)}

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                return {"loss": self.weight.sum() * 0 + self.losses[self.training].pop(0), "logits": x}

        rows = [{"x": torch.zeros(1), "labels": torch.zeros(1)}] * len(losses)
        arguments = {"max_steps": len(losses), "logging_steps": 1, "save_strategy": "no", **arguments}
        if validation:
            arguments = {"eval_strategy": "steps", "eval_steps": 1, **arguments}
        trainer = Trainer(
            model=Scripted(),
            args=TrainingArguments(
                str(tmp_path / "out"),
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                per_device_train_batch_size=1,
                logging_nan_inf_filter=False,
                **arguments,
            ),
            train_dataset=rows,
            eval_dataset=rows[:1],
            callbacks=callbacks,
        )
        error: BaseException | None = None
        try:
            trainer.train()
        except FinetuningError as raised:
            error = raised
        saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
        return ScriptedRun(trainer.state, saved, error)

    return run
