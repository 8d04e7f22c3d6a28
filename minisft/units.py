"""Numbers as people read them: a few digits and a unit."""


def digits(value: float, count: int) -> str:
    """So many significant digits: 0.0119, 4.49, 123, 7.50e-5; nan, inf."""
    is_small = 0 < abs(value) < 1e-3
    text = f"{value:.{count - 1}e}" if is_small else f"{value:#.{count}g}".rstrip(".")
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def thousands(value: float) -> str:
    """Three significant digits: 167, 2.23k, 12.3k, 3.17M."""
    value = float(f"{value:.3g}")
    unit, scale = next((u for u in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= u[1]), ("", 1.0))
    return digits(value / scale, 3) + unit


def duration(seconds: float) -> str:
    """9s, 1m05s, 3h12m or 2d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def size(num_bytes: float) -> str:
    """312 bytes, 45.2 kB, 1.25 MB, 3.40 GB: three significant digits, in the unit that shows them."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    text = thousands(num_bytes)
    return f"{text[:-1]} {text[-1]}B"
