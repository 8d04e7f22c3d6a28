"""Tables of choices whose code needs torch, so that a configuration can be checked without it.

Choices whose code does without torch are where that code is: the schedules in schedule.py, the losses in preference/losses.py.
"""

# name -> its options with their defaults; the update rules are in optimizers.py
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"momentum": 0.0},
    "lion": {},
    "adamw": {},
    "adamw_minisft": {},
    "adamw_8bit": {},
    "stable_adamw": {},
    "schedule_free_adamw": {},
    "adafactor": {},
    "muon": {"momentum": 0.95},
}
ADAMW = ("adamw", "adamw_minisft", "adamw_8bit")  # kernels/adamw.py serves these: bf16 weights, offloaded moments


def wrong_optimizer_option(name: str, key: str, value: float) -> str:
    """What optimizer `name` expects instead of this option; empty if the option is right."""
    known = OPTIMIZERS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    takes = ", ".join(f"{key} (from 0 to below 1)" for key in known) or "no options"
    return "" if key in known and is_number and 0 <= value < 1 else f"{name} takes {takes}"
