"""One run of `generate`: prompts in, an output file with a record for each answer out."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuning.config.sections.generation import GenerationModel
from finetuning.config.sections.model import NoQuantization, Quantized
from finetuning.errors import Interrupted
from finetuning.inference.batching import DEFAULT_BATCH_TOKENS, padding_side, plan_batches
from finetuning.inference.generate import EncodedPrompt, Generation, encode_prompts, generate_batches
from finetuning.inference.generation_params import build_parameters, check_parameters
from finetuning.inference.load import load_generator
from finetuning.inference.output import RecordSpool, check_output, write_records
from finetuning.inference.prompts import GenerationPrompt

Record = dict[str, Any]
RecordMaker = Callable[[GenerationPrompt, EncodedPrompt, Generation, Mapping[str, Any]], Record]


@dataclass(frozen=True)
class GenerationJob:
    """What is generated, by which model, how."""

    prompts: Sequence[GenerationPrompt]
    model_conf: GenerationModel
    quant_conf: NoQuantization | Quantized
    gen_params: Mapping[str, Any]
    seed: int = 42
    batch_size: int | None = None
    """Most rows of a batch; None for as many as the token budget allows."""
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    def fingerprint(self) -> str:
        """A digest of all that decides over the answers; of files, their sizes and times stand for the content."""
        told = {
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "model_conf": self.model_conf.model_dump(mode="json"),
            "quant_conf": self.quant_conf.model_dump(mode="json"),
            "gen_params": dict(self.gen_params),
            "seed": self.seed,
            "batch": [self.batch_size, self.batch_tokens],
            "files": [
                (str(file), file.stat().st_size, file.stat().st_mtime_ns)
                for folder in (self.model_conf.model, self.model_conf.adapter, self.model_conf.tokenizer)
                for file in sorted(Path(folder).expanduser().glob("*") if folder else ())
            ],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def told(self) -> Record:
        """What each record says of how it was made, besides the parameters of generation."""
        return {
            "quant_conf": self.quant_conf.model_dump(mode="json", exclude_none=True),
            "model_conf": self.model_conf.model_dump(mode="json", exclude_none=True),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class GenerationProgress:
    """How far a job is."""

    prompts_done: int
    prompts_total: int
    tokens: int
    """Tokens written so far by this run."""
    seconds: float
    """Since the model was ready."""


@dataclass(frozen=True)
class ProgressCallback:
    """Who is told what while a job runs."""

    on_progress: Callable[[GenerationProgress], None] = lambda progress: None
    on_text: Callable[[str], None] | None = None


def answer_record(
    prompt: GenerationPrompt, encoded: EncodedPrompt, answer: Generation, gen_params: Mapping[str, Any]
) -> Record:
    """One member of the output list, as Silogen's inference tools write it."""
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
    prompt: GenerationPrompt, encoded: EncodedPrompt, answer: Generation, gen_params: Mapping[str, Any]
) -> Record:
    """One member of fms-hf-tuning's result; its output begins with the prompt and holds special tokens."""
    return {"input": encoded.text, "output": answer.raw}


def generate_records(
    job: GenerationJob, output: Path, watch: ProgressCallback, make_record: RecordMaker = answer_record
) -> list[Record]:
    """The records of all prompts in the prompts' order, written to `output`.

    When the run is interrupted the records so far are written, in the same order, and the next run of the same job
    goes on with the rest.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; `output` holds what was done.
        FinetuningError: anything that the user can mend; nothing is written then.
    """
    check_output(output)
    check_parameters(job.gen_params)
    generator = load_generator(job.model_conf, job.quant_conf)
    parameters = build_parameters(job.gen_params, generator.tokenizer, generator.model, generator.pad_token_id)
    prompts = encode_prompts(job.prompts, generator.tokenizer, parameters.max_prompt_tokens)
    told = parameters.told | job.told()
    batches = plan_batches(
        [len(prompt.ids) for prompt in prompts],
        parameters.max_new_tokens,
        budget=job.batch_tokens,
        most_rows=job.batch_size,
        most_padding=padding_side(generator.device.type, parameters.max_new_tokens),
    )
    spool = RecordSpool(output, job.fingerprint())
    # A batch is made again whole, so that its answers are drawn from the same random numbers.
    batches = [batch for batch in batches if spool.missing(batch)]
    tokens, started = 0, time.monotonic()
    watch.on_progress(GenerationProgress(len(spool.records), len(prompts), 0, 0.0))
    with _kept(spool, output, len(prompts)), _terminable():
        for answers in generate_batches(generator, prompts, batches, parameters, job.seed, watch.on_text):
            spool.add(
                {
                    index: [make_record(job.prompts[index], prompts[index], answer, told) for answer in given]
                    for index, given in answers.items()
                }
            )
            tokens += sum(answer.tokens for given in answers.values() for answer in given)
            watch.on_progress(GenerationProgress(len(spool.records), len(prompts), tokens, time.monotonic() - started))
    records = spool.in_order()
    write_records(output, records)
    spool.close(remove=True)
    return records


@contextmanager
def _kept(spool: RecordSpool, output: Path, total: int) -> Iterator[None]:
    """Keeps the records so far when the block does not come to its end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the records so far are in `output`, too.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        write_records(output, spool.in_order())
        spool.close(remove=False)
        number = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(
            f"interrupted: {output} holds {len(spool.records)} of {total} answers; the same command goes on", number
        ) from None
    except BaseException:
        spool.close(remove=not spool.records)
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM is raised as Interrupted."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signal_number: int, frame: Any) -> None:
    raise Interrupted("terminated", signal_number)
