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
