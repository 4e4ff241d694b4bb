"""Every operation by its name in `unlearn.operations`: the one place where names become code.

An operation takes a Context and a Forget and returns an Outcome; none changes the run it starts
from, and NotApplicable carries the words that tables print instead of numbers.
"""

from collections.abc import Callable
from functools import partial

from tiered.unlearning import deletion, gradient, purge, targeted
from tiered.unlearning.systems import Context, Forget, Outcome

METHODS: dict[str, gradient.Method] = gradient.METHODS | targeted.METHODS

OPERATIONS: dict[str, Callable[[Context, Forget], Outcome]] = {
    "original": deletion.original,
    "gold": deletion.gold,
    "gold-recluster": deletion.gold_recluster,
    "delete-S0": deletion.delete_s0,
    "delete-S1": deletion.delete_s1,
    "delete-S2": deletion.delete_s2,
    "sisa": deletion.sisa,
    "mask-skew": purge.mask_skew,
    "mask-topshare": purge.mask_topshare,
    "mask-mass": purge.mask_mass,
    "mask-random": purge.mask_random,
    "mask-massmatched": purge.mask_massmatched,
    "reinit": purge.reinit,
    **{name: partial(gradient.unlearn, name, method) for name, method in METHODS.items()},
}
