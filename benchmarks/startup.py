"""Start-up: `--help`, a typo in each section, and the time to the first step, beside TRL's or another version's.

    python benchmarks/startup.py [--rounds 5] [--baseline CHECKOUT]

Commands take turns; each figure is the median of the CPU seconds (user and system) of whole processes, which a busy
machine disturbs less than wall time. The first step is the moment when the step is told; the process is ended there.
`--baseline` compares this checkout with another one of this repository, under the same libraries, and leaves TRL out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
TYPOS = {
    "data_conf": "data_conf.chat_template_nam=chat-ml",
    "training_args": "training_args.learning_rat=1e-4",
    "batchsize_conf": "batchsize_conf.total_train_batchsize=8",
    "peft_conf": "peft_conf.peft_kwargs.rr=8",
    "run_conf": "run_conf.modl=x",
    "sft_args": "sft_args.max_seq_lenght=8",
    "quant_conf": "quant_conf.load_in_4bits=true",
}


def cpu_of(command: list[str], environ: dict[str, str]) -> float:
    """CPU seconds of a command, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_until(command: list[str], sign: str, environ: dict[str, str]) -> float:
    """CPU seconds that a command had used when it wrote a line that matches `sign`."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.search(sign, line):
                fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                process.kill()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    raise SystemExit(f"{command[0]} never wrote {sign!r}:\n{''.join(lines[-20:])}")


def program_of(checkout: Path) -> list[str]:
    """The command that runs a checkout's console script `finetuning`, wherever the installed one points."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["finetuning"].partition(":")
    source = str((checkout / "src").resolve())
    code = f"import sys; sys.path.insert(0, {source!r}); from {module} import {function}; sys.exit({function}())"
    return [sys.executable, "-c", code]


def commands_of(program: list[str], config: Path, out: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The commands of the engine that run to their end, by name, and the one that trains into a folder."""
    typos = {f"typo in {name}": [*program, "sft", str(config), typo] for name, typo in TYPOS.items()}
    whole = {"finetuning --help": [*program, "--help"], **typos}
    return whole, [*program, "sft", str(config), f"training_args.output_dir={out}"]


def measure_beside_trl(rounds: int, work: Path, environ: dict[str, str]) -> dict[str, list[float]]:
    """CPU seconds per command and round, of the installed engine and of TRL."""
    bad = work / "trl.yaml"
    bad.write_text(
        f"model_name_or_path: {work / 'model'}\ndataset_name: {work}\noutput_dir: {work / 'trl'}\nlearning_rat: 1e-4\n",
        encoding="utf-8",
    )
    trl = str(BIN / "trl")
    script = [sys.executable, str(HERE / "training" / "trl_script.py"), str(work)]
    figures: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        whole, training = commands_of([str(BIN / "finetuning")], work / "sft.yaml", work / f"out-{number}")
        whole |= {"trl --help": [trl, "--help"], "typo, trl sft": [trl, "sft", "--config", str(bad)]}
        for name, command in whole.items():
            figures.setdefault(name, []).append(cpu_of(command, environ))
        figures.setdefault("first step, finetuning", []).append(cpu_until(training, r"step +1/", environ))
        figures.setdefault("first step, TRL script", []).append(cpu_until(script, "FIRST STEP", environ))
    return figures


def measure_beside_baseline(
    rounds: int, work: Path, environ: dict[str, str], baseline: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU seconds per command and round, of this checkout and of the baseline."""
    programs = [program_of(HERE.parent), program_of(baseline)]
    figures: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for number in range(rounds + 1):
        for which, program in enumerate(programs):
            whole, training = commands_of(program, work / "sft.yaml", work / f"out-{which}-{number}")
            for name, command in whole.items():
                figures[which].setdefault(name, []).append(cpu_of(command, environ))
            figures[which].setdefault("first step", []).append(cpu_until(training, r"step +1/", environ))
    return figures


def row(name: str, values: list[float], reference: list[float]) -> str:
    """A line of the table; the first value of each, which fills the caches, does not count."""
    median, ratio = statistics.median(values[1:]), statistics.median(values[1:]) / statistics.median(reference[1:])
    return f"| {name} | {median:.2f} | {min(values[1:]):.2f} to {max(values[1:]):.2f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    options = parser.parse_args()
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, HERE / "training" / "make_inputs.py", work], check=True, env=environ)
        if options.baseline:
            ours, theirs = measure_beside_baseline(options.rounds, work, environ, options.baseline)
            print("| command | CPU s, median | min to max | ratio to the baseline's |\n|---|---|---|---|")
            for name in ours:
                print(row(name, ours[name], theirs[name]))
                print(row(f"{name}, baseline", theirs[name], theirs[name]))
            return
        figures = measure_beside_trl(options.rounds, work, environ)
    print("| command | CPU s, median | min to max | ratio to TRL's |\n|---|---|---|---|")
    for name, values in figures.items():
        beside = "first step, TRL script" if "step" in name else "trl --help" if "help" in name else "typo, trl sft"
        print(row(name, values, figures[beside]))
    print(json.dumps({name: statistics.median(values[1:]) for name, values in figures.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
