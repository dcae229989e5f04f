"""Settings of defenses for tests: as they are, but for how long they take."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from reproduce.training import Recipe

# What makes a setting expensive without changing what is tested, beside the epochs of recipes.
QUICK = {
    "iterations": 10,
    "rounds": 1,
    "steps": 2,
    "batches": 2,
    "images": 8,
}


def shortened(config: Any, epochs: int = 1) -> Any:
    """The config with `epochs` epochs of batches of 32 in each of its recipes, nested ones too, and QUICK's values."""
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Recipe):
            changes[field.name] = replace(value, epochs=epochs, batch=32)
        elif is_dataclass(value):
            changes[field.name] = shortened(value, epochs)
        elif field.name in QUICK:
            changes[field.name] = QUICK[field.name]
    return replace(config, **changes)
