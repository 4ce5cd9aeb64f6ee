"""Start-up: `--help`, a typo in each section, and the time to the first step, beside TRL's.

    python benchmarks/startup.py [--rounds 5]

Commands take turns; each figure is the median of the CPU seconds (user and system) of whole processes, which a busy
machine disturbs less than wall time. The first step is the moment when the step is told; the process is ended there.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
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
        config = work / "sft.yaml"
        bad = work / "trl.yaml"
        bad.write_text(
            f"model_name_or_path: {work / 'model'}\ndataset_name: {work}\n"
            f"output_dir: {work / 'trl'}\nlearning_rat: 1e-4\n",
            encoding="utf-8",
        )
        finetuning, trl = str(BIN / "finetuning"), str(BIN / "trl")
        whole = {
            "finetuning --help": [finetuning, "--help"],
            "trl --help": [trl, "--help"],
            **{f"typo in {name}": [finetuning, "sft", str(config), typo] for name, typo in TYPOS.items()},
            "typo, trl sft": [trl, "sft", "--config", str(bad)],
        }
        script = [sys.executable, str(HERE / "training" / "trl_script.py"), str(work)]
        figures: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for name, command in whole.items():
                figures.setdefault(name, []).append(cpu_of(command, environ))
            ours = [finetuning, "sft", str(config), f"training_args.output_dir={work / f'out-{number}'}"]
            figures.setdefault("first step, finetuning", []).append(cpu_until(ours, r"step +1/", environ))
            figures.setdefault("first step, TRL script", []).append(cpu_until(script, "FIRST STEP", environ))
    medians = {name: statistics.median(values[1:]) for name, values in figures.items()}
    beside = {
        name: "first step, TRL script" if "step" in name else "trl --help" if "help" in name else "typo, trl sft"
        for name in medians
    }
    print("| command | CPU s, median | min to max | ratio to TRL's |\n|---|---|---|---|")
    for name, median in medians.items():
        values = figures[name][1:]
        ratio = median / medians[beside[name]]
        print(f"| {name} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | {ratio:.2f} |")
    print(json.dumps(medians), file=sys.stderr)


if __name__ == "__main__":
    main()
