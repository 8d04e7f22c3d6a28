"""What an adapter is: its options, by PEFT's names, and which modules get one, by PEFT's rules.

lora.py has the maths and the papers. This file knows no torch, so that the configuration can read its choices.
"""

import math
import re
from dataclasses import dataclass, field, replace

from minisft.errors import UserError

ALL_LINEAR = "all-linear"  # every linear layer but the head
INITS = ("kaiming", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The options of an adapter, by PEFT's names."""

    r: int
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0  # of the input of A
    target_modules: tuple[str, ...] | str = ALL_LINEAR  # ends of module names; or a regular expression of whole names
    layers_to_transform: tuple[int, ...] | None = None  # numbers of layers; None: all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression of a name's end -> its own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    # "kaiming" draws A uniform in +-1 / sqrt(in), "gaussian" from N(0, 1 / r^2), both with B = 0. "pissa" takes both from the
    # exact singular value decomposition, pissa_niter_n from an approximate one of n iterations: seconds instead of minutes.
    init_lora_weights: str = "kaiming"
    modules_to_save: tuple[str, ...] = ()  # trained whole, and saved with the adapter
    # "embed_tokens" or "lm_head" -> ids of the tokens whose rows in it are trained
    trainable_token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_pissa(self) -> bool:
        return self.init_lora_weights.startswith("pissa")

    def plain(self) -> "LoraOptions":
        """The options of the plain adapter as which this one is saved. PiSSA's has twice the rank, at the same scale."""
        if not self.is_pissa:
            return self
        times = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=times * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: times * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights="kaiming",
        )


def is_target(site: str, options: LoraOptions) -> bool:
    """Whether the module has an adapter, by PEFT's rules."""
    targets = options.target_modules
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return re.fullmatch(targets, site) is not None  # it says the layers too
    if targets != ALL_LINEAR and not any(site == target or site.endswith(f".{target}") for target in targets):
        return False
    number = re.search(r"\.(\d+)\.", site)
    return options.layers_to_transform is None or (number is not None and int(number[1]) in options.layers_to_transform)


def refuse_targets_without_layer(sites: list[str], options: LoraOptions) -> None:
    """UserError where target_modules, or one name in it, is that of no linear layer of a model with these sites."""
    targets, missing = options.target_modules, []
    if not isinstance(targets, str):
        everywhere = replace(options, layers_to_transform=None)
        one = [replace(everywhere, target_modules=(target,)) for target in targets]
        missing = [o.target_modules[0] for o in one if not any(is_target(site, o) for site in sites)]
    if not missing and any(is_target(site, options) for site in sites):
        return
    where = f" in layers {list(options.layers_to_transform)}" if options.layers_to_transform and not missing else ""
    names = sorted({site.rpartition(".")[2] for site in sites})
    hint = f'this model has {", ".join(names)}; or "{ALL_LINEAR}"'
    if isinstance(targets, str) and targets != ALL_LINEAR:
        hint = f'a string is a regular expression of whole names, and names are a list, as in ["{names[0]}"]; {hint}'
    raise UserError(f"lora.target_modules: no linear layer is named {', '.join(missing) or targets}{where}", hint=hint)


def of_pattern(patterns: dict, site: str, default: float) -> float:
    """The value of the first pattern that matches the end of the name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", site)), default)


def scale_of(site: str, options: LoraOptions) -> tuple[int, float]:
    """(r, s) of a site."""
    r = int(of_pattern(options.rank_pattern, site, options.r))
    alpha = of_pattern(options.alpha_pattern, site, options.lora_alpha)
    return r, alpha / (math.sqrt(r) if options.use_rslora else r)
