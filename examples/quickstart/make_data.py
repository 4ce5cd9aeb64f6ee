"""The quickstart's data: orders with the JSON that they mean, in four files.

train.jsonl         {"messages": [order, JSON]}: what `finetuning sft` learns from
test.jsonl          {"prompt_messages": [order], "correct_answers": [JSON]}: orders that are in no other file
preferences.jsonl   {"prompt_messages", "chosen_messages", "rejected_messages"}: the JSON, and one with a fault
prompts.jsonl       as test.jsonl, of the orders of train.jsonl: what `finetuning grpo` learns from

python make_data.py OUT [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orders import DAYS, ITEMS, NUMBERS, Order, draw, every_order

TRAINING_ROWS = 2000
TEST_ROWS = 200
PREFERENCE_ROWS = 800
PROMPT_ROWS = 400


def message(role: str, content: str) -> dict[str, str]:
    """One chat message."""
    return {"role": role, "content": content}


def with_fault(order: Order, rng: random.Random) -> Order:
    """The order with another item, number or day."""
    kind = rng.choice(("item", "quantity", "day"))
    values: dict[str, list[Any]] = {"item": list(ITEMS), "quantity": list(NUMBERS), "day": list(DAYS)}
    right = getattr(order, kind)
    return replace(order, **{kind: rng.choice([value for value in values[kind] if value != right])})


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's data.")
    parser.add_argument("out", type=Path, help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draws")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    orders = every_order()
    rng.shuffle(orders)
    held_out, rest = orders[:TEST_ROWS], orders[TEST_ROWS:]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        arguments.out / "train.jsonl",
        (
            {"messages": [message("user", text), message("assistant", order.as_json)], "id": f"train-{number}"}
            for number, (text, order) in enumerate(draw(rest, TRAINING_ROWS, rng))
        ),
    )
    write_jsonl(
        arguments.out / "test.jsonl",
        (
            {"prompt_messages": [message("user", text)], "correct_answers": [order.as_json], "id": f"test-{number}"}
            for number, (text, order) in enumerate(draw(held_out, TEST_ROWS, rng))
        ),
    )
    write_jsonl(
        arguments.out / "preferences.jsonl",
        (
            {
                "prompt_messages": [message("user", text)],
                "chosen_messages": [message("assistant", order.as_json)],
                "rejected_messages": [message("assistant", with_fault(order, rng).as_json)],
                "id": f"preference-{number}",
            }
            for number, (text, order) in enumerate(draw(rest, PREFERENCE_ROWS, rng))
        ),
    )
    write_jsonl(
        arguments.out / "prompts.jsonl",
        (
            {"prompt_messages": [message("user", text)], "correct_answers": [order.as_json], "id": f"prompt-{number}"}
            for number, (text, order) in enumerate(draw(rest, PROMPT_ROWS, rng))
        ),
    )
    print(f"{TRAINING_ROWS} training, {TEST_ROWS} test and {PREFERENCE_ROWS} preference rows in {arguments.out}")


if __name__ == "__main__":
    main()
