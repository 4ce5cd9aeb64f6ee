"""The task of the quickstart: an order in English goes in, a JSON object comes out.

    bring me three apples on friday, please   ->   {"item": "apple", "qty": 3, "when": "friday"}

The base model has seen such orders too, but answers them as a polite shop assistant would, in words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

ITEMS = {
    "apple": "apples",
    "banana": "bananas",
    "blanket": "blankets",
    "bottle": "bottles",
    "box": "boxes",
    "brush": "brushes",
    "bucket": "buckets",
    "cable": "cables",
    "candle": "candles",
    "carrot": "carrots",
    "chair": "chairs",
    "cherry": "cherries",
    "cup": "cups",
    "egg": "eggs",
    "fork": "forks",
    "glass": "glasses",
    "hammer": "hammers",
    "jar": "jars",
    "knife": "knives",
    "lamp": "lamps",
    "leaf": "leaves",
    "lemon": "lemons",
    "melon": "melons",
    "mouse": "mice",
    "needle": "needles",
    "onion": "onions",
    "orange": "oranges",
    "peach": "peaches",
    "pear": "pears",
    "pen": "pens",
    "plate": "plates",
    "potato": "potatoes",
    "shelf": "shelves",
    "shirt": "shirts",
    "spoon": "spoons",
    "stamp": "stamps",
    "ticket": "tickets",
    "tomato": "tomatoes",
    "towel": "towels",
    "umbrella": "umbrellas",
}
NUMBERS = {
    1: ("one", "a single", "1"),
    2: ("two", "a pair of", "2"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "half a dozen", "6"),
    7: ("seven", "7"),
    8: ("eight", "8"),
    9: ("nine", "9"),
    10: ("ten", "10"),
    11: ("eleven", "11"),
    12: ("twelve", "a dozen", "12"),
}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "today", "tomorrow", "tonight")
PHRASES = (
    "bring me {goods} {when}, please",
    "please send {goods} {when}",
    "i would like {goods} {when}",
    "i need {goods} {when}",
    "we need {goods} {when}, thank you",
    "could you deliver {goods} {when}?",
    "can we get {goods} {when}?",
    "{when} i will need {goods}",
    "{when}, please bring {goods}",
    "put {goods} on my list {when}",
    "{goods} {when}, please",
    "order {goods} for us, to come {when}",
    "my order {when}: {goods}",
    "the kitchen wants {goods} {when}",
    "hello, {goods} {when} would be lovely",
    "would you have {goods} ready {when}?",
)
CONFIRMATIONS = (
    "of course, {goods} {when}.",
    "with pleasure: {goods}, {when}.",
    "you will have {goods} {when}.",
    "thank you, we will bring {goods} {when}.",
)


@dataclass(frozen=True)
class Order:
    """How many of what, and when."""

    item: str
    quantity: int
    day: str

    @property
    def as_json(self) -> str:
        """The one right answer, as text."""
        return json.dumps({"item": self.item, "qty": self.quantity, "when": self.day})

    def goods(self, rng: random.Random) -> str:
        """The number, in words or figures, and the item in its right number: `half a dozen boxes`."""
        return f"{rng.choice(NUMBERS[self.quantity])} {self.item if self.quantity == 1 else ITEMS[self.item]}"

    @property
    def when(self) -> str:
        """The day, with the preposition that it needs."""
        return f"on {self.day}" if self.day.endswith("day") and self.day != "today" else self.day


def every_order() -> list[Order]:
    """All orders that there are, in a fixed order."""
    return [Order(item, quantity, day) for item in ITEMS for quantity in NUMBERS for day in DAYS]


def spoken(order: Order, rng: random.Random) -> str:
    """The order as somebody says it."""
    text = rng.choice(PHRASES).format(goods=order.goods(rng), when=order.when)
    return text.capitalize() if rng.random() < 0.3 else text


def small_talk(order: Order, rng: random.Random) -> str:
    """What a polite shop assistant says to the order: the base model's answer."""
    return rng.choice(CONFIRMATIONS).format(goods=order.goods(rng), when=order.when)


def draw(orders: list[Order], count: int, rng: random.Random) -> Iterator[tuple[str, Order]]:
    """`count` orders, spoken; all different while there are enough of them."""
    for index in range(count):
        if index % len(orders) == 0:
            orders = rng.sample(orders, len(orders))
        order = orders[index % len(orders)]
        yield spoken(order, rng), order
