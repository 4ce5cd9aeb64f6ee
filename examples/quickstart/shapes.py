"""The data of the quickstart with images: pictures of shapes, drawn here, and what each of them shows.

train.jsonl   {"messages": [question with <image>, "a red circle"], "images": [file]}: what `finetuning sft` learns from
test.jsonl    {"prompt_messages": [question], "images", "correct_answers"}: other pictures of the same shapes

python shapes.py OUT [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 32
"""Width and height of a picture, in pixels."""
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUESTION = "what is this?"
TRAINING_ROWS = 2400
TEST_ROWS = 240


def draw(shape: str, color: str, rng: random.Random) -> Image.Image:
    """A picture of a shape, of any size and anywhere, on a bright ground."""
    ground = tuple(rng.randint(215, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    pen = ImageDraw.Draw(image)
    radius = rng.randint(9, 13)
    x, y = (rng.randint(radius + 1, SIZE - radius - 2) for _ in range(2))
    fill = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLORS[color])
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill)
    elif shape == "triangle":
        half = radius * math.cos(math.pi / 6)
        pen.polygon([(x, y - radius), (x - half, y + radius), (x + half, y + radius)], fill)
    else:
        width = radius // 3
        pen.rectangle((x - width, y - radius, x + width, y + radius), fill)
        pen.rectangle((x - radius, y - width, x + radius, y + width), fill)
    return image


def answer(shape: str, color: str) -> str:
    """What a picture shows, in words."""
    return f"a {color} {shape}"


def write_rows(folder: Path, name: str, count: int, rng: random.Random) -> None:
    """Draws pictures into a folder of their own, and writes a row for each; every shape and color comes up as often."""
    (folder / name).mkdir(parents=True)
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    lines = []
    for number in range(count):
        shape, color = kinds[number % len(kinds)]
        file = f"{name}/{number:04}.png"
        draw(shape, color, rng).save(folder / file)
        user = {"role": "user", "content": f"<image>\n{QUESTION}"}
        said = answer(shape, color)
        if name == "train":
            row = {"messages": [user, {"role": "assistant", "content": said}], "images": [file]}
        else:
            row = {"prompt_messages": [user], "images": [file], "correct_answers": [said]}
        lines.append(json.dumps(row | {"id": f"{name}-{number}"}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the data of the quickstart with images.")
    parser.add_argument("out", type=Path, help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=1, help="seed of the pictures")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    write_rows(arguments.out, "train", TRAINING_ROWS, rng)
    write_rows(arguments.out, "test", TEST_ROWS, rng)
    print(f"{TRAINING_ROWS} training and {TEST_ROWS} test pictures in {arguments.out}")


if __name__ == "__main__":
    main()
