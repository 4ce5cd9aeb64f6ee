"""One run of `generate`: answer all prompts and write a record for each answer."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization, Quantized
from finetuning.errors import ConfigError, Interrupted, Location
from finetuning.inference.batching import DEFAULT_BATCH_TOKENS, max_useful_padding, plan_batches
from finetuning.inference.generate import (
    EncodedPrompt,
    Generation,
    describe_batch_error,
    encode_prompts,
    generate_batches,
)
from finetuning.inference.generation_params import build_parameters, check_parameters
from finetuning.inference.load import load_generator, load_without_weights
from finetuning.inference.output import Record, RecordJournal, check_output, write_records
from finetuning.inference.prompts import GenerationPrompt
from finetuning.inference.vllm import VllmBackend, check_job, generate_with_vllm

RecordMaker: TypeAlias = Callable[[GenerationPrompt, EncodedPrompt, Generation, Mapping[str, object]], Record]


@dataclass(frozen=True)
class GenerationJob:
    """The prompts, the model and the parameters of a run."""

    prompts: Sequence[GenerationPrompt]
    model_conf: GenerationModel
    quant_conf: NoQuantization | Quantized
    gen_params: Mapping[str, object]
    seed: int = 42
    batch_size: int | None = None
    """Maximum rows of a batch; None for as many as the token budget allows."""
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    vllm: VllmBackend | None = None
    """The vLLM that generates the answers; None for transformers."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """Sizes of the images of prompts that have some."""

    def fingerprint(self) -> str:
        """Return a hash of everything that the answers depend on; files count with size and modification time."""
        inputs = {
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "model_conf": self.model_conf.model_dump(mode="json"),
            "quant_conf": self.quant_conf.model_dump(mode="json"),
            "gen_params": dict(self.gen_params),
            "seed": self.seed,
            "batch": [self.batch_size, self.batch_tokens],
            "vllm": self.vllm.conf.model_dump(mode="json") if self.vllm is not None else None,
            "images": self.images.model_dump(mode="json"),
            "files": [
                (str(file), file.stat().st_size, file.stat().st_mtime_ns)
                for folder in (self.model_conf.model, self.model_conf.adapter, self.model_conf.tokenizer)
                for file in sorted(Path(folder).expanduser().glob("*") if folder else ())
            ],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()

    def provenance(self) -> Record:
        """Return the configuration that each record contains, next to the parameters of generation."""
        return {
            "quant_conf": self.quant_conf.model_dump(mode="json", exclude_none=True),
            "model_conf": self.model_conf.model_dump(mode="json", exclude_none=True),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class GenerationProgress:
    """The progress of a job."""

    prompts_done: int
    prompts_total: int
    tokens: int
    """Tokens generated so far by this run."""
    seconds: float
    """Time since the model was loaded."""


@dataclass(frozen=True)
class ProgressCallback:
    """Functions that are called while a job runs."""

    on_progress: Callable[[GenerationProgress], None] = lambda progress: None
    on_text: Callable[[str], None] | None = None
    on_note: Callable[[str], None] = lambda note: None


def answer_record(
    prompt: GenerationPrompt, encoded: EncodedPrompt, answer: Generation, gen_params: Mapping[str, object]
) -> Record:
    """Return a record of the output in the format of Silogen's inference tools."""
    return {
        "dataset": prompt.dataset,
        "id": prompt.id,
        "prompt": encoded.text,
        "answer": answer.text,
        "correct_answers": list(prompt.correct_answers),
        "test_type": "open-ended",
        "data_collection": prompt.data_collection,
        "truncated": encoded.truncated,
        "all_text_raw": answer.raw,
        **prompt.carried,
        "gen_params": dict(gen_params),
    }


def input_output_record(
    prompt: GenerationPrompt, encoded: EncodedPrompt, answer: Generation, gen_params: Mapping[str, object]
) -> Record:
    """Return a record in the format of fms-hf-tuning: the output includes the prompt and special tokens."""
    return {"input": encoded.text, "output": answer.raw}


def generate_records(
    job: GenerationJob, output: Path, progress: ProgressCallback, make_record: RecordMaker = answer_record
) -> list[Record]:
    """Answer all prompts, write the records to `output` in the order of the prompts, and return them.

    If the run is interrupted, the records so far are written in the same order, and the next run of the same job
    continues with the other prompts.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; `output` contains the finished records.
        FinetuningError: an error that the user can fix; no output is written.
    """
    check_output(output)
    check_parameters(job.gen_params)
    prepared = _prepare_vllm(job, progress) if job.vllm is not None else _prepare_transformers(job, progress)
    prompts = prepared.prompts
    journal = RecordJournal(output, job.fingerprint())
    tokens, started = 0, time.monotonic()
    progress.on_progress(GenerationProgress(len(journal.records), len(prompts), 0, 0.0))
    with _keep_records(journal, output, len(prompts)), _raise_on_signal():
        for answers in prepared.generate(journal):
            journal.add(
                {
                    index: [
                        make_record(job.prompts[index], prompts[index], answer, prepared.gen_params)
                        for answer in generations
                    ]
                    for index, generations in answers.items()
                }
            )
            tokens += sum(answer.tokens for generations in answers.values() for answer in generations)
            progress.on_progress(
                GenerationProgress(len(journal.records), len(prompts), tokens, time.monotonic() - started)
            )
    records = journal.in_order()
    write_records(output, records)
    journal.close(remove=True)
    return records


@dataclass(frozen=True)
class _PreparedJob:
    """A job whose model or server can generate."""

    prompts: list[EncodedPrompt]
    gen_params: Mapping[str, object]
    """For the records: the parameters of generation, and where they come from."""
    generate: Callable[[RecordJournal], Iterator[dict[int, list[Generation]]]]
    """Yields the answers, by index, of the prompts that have no records yet."""


def _prepare_transformers(job: GenerationJob, progress: ProgressCallback) -> _PreparedJob:
    generator = load_generator(job.model_conf, job.quant_conf)
    for note in generator.notes:
        progress.on_note(note)
    parameters = build_parameters(job.gen_params, generator.tokenizer, generator.model, generator.pad_token_id)
    images = None
    if any(prompt.images for prompt in job.prompts):
        from finetuning.inference.images import check_beams, image_processor_of

        check_beams(parameters.config.num_beams)
        images = image_processor_of(job.model_conf, job.images, generator.tokenizer)
    prompts = encode_prompts(job.prompts, generator.tokenizer, parameters.max_prompt_tokens, images)
    lengths = [len(prompt.ids) for prompt in prompts]
    max_padding = max_useful_padding(generator.device.type, parameters.max_new_tokens)
    plan = partial(plan_batches, lengths, parameters.max_new_tokens, budget=job.batch_tokens, max_rows=job.batch_size)
    batches = plan(max_padding=max_padding)
    if any(len(batch) > 1 for batch in batches) and (error := describe_batch_error(generator, (4, 4))):
        progress.on_note(f"{error}: each prompt is a batch of its own")
        batches = plan(max_rows=1)
    elif any(len({lengths[index] for index in batch}) > 1 for batch in batches) and (
        error := describe_batch_error(generator, (9, 4))
    ):
        progress.on_note(f"{error}: only prompts of equal length share a batch")
        batches = plan(max_padding=0)

    def generate(journal: RecordJournal) -> Iterator[dict[int, list[Generation]]]:
        # An unfinished batch is repeated as a whole, so that its answers are sampled from the same random numbers.
        unfinished = [batch for batch in batches if journal.missing(batch)]
        return generate_batches(generator, prompts, unfinished, parameters, job.seed, progress.on_text)

    return _PreparedJob(prompts, parameters.reported | job.provenance(), generate)


def _prepare_vllm(job: GenerationJob, progress: ProgressCallback) -> _PreparedJob:
    assert job.vllm is not None
    start = job.vllm.start
    check_job(job.vllm.conf, job.quant_conf, job.gen_params)
    with_images = next((prompt for prompt in job.prompts if prompt.images), None)
    if with_images is not None:
        raise ConfigError(
            f"vllm is given the tokens of prompts only, and {with_images.location} has images",
            location=Location(key="backend"),
            hint="Set backend: transformers, or ask a server of your own: docs/how-to/images.md shows the request.",
        )
    loaded = load_without_weights(job.model_conf)
    for note in loaded.notes:
        progress.on_note(note)
    parameters = build_parameters(job.gen_params, loaded.tokenizer, loaded, loaded.pad_token_id)
    prompts = encode_prompts(job.prompts, loaded.tokenizer, parameters.max_prompt_tokens)

    def generate(journal: RecordJournal) -> Iterator[dict[int, list[Generation]]]:
        missing = journal.missing(range(len(prompts)))
        if not missing:
            return iter(())
        return generate_with_vllm(
            start, job.model_conf, loaded, prompts, missing, parameters, job.seed, progress.on_note
        )

    return _PreparedJob(prompts, parameters.reported | job.provenance(), generate)


@contextmanager
def _keep_records(journal: RecordJournal, output: Path, total: int) -> Iterator[None]:
    """Keep the records so far if the block fails.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the records so far are also written to `output`.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        write_records(output, journal.in_order())
        journal.close(remove=False)
        number = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(
            f"interrupted: {output} contains {len(journal.records)} of {total} answers; rerun the command to continue",
            number,
        ) from None
    except BaseException:
        journal.close(remove=not journal.records)
        raise


@contextmanager
def _raise_on_signal() -> Iterator[None]:
    """Raise Interrupted on SIGTERM, and on SIGHUP unless it is ignored, while the block runs."""
    numbers = [signal.SIGTERM]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise Interrupted("terminated", signal_number)
