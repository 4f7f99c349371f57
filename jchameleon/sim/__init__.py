"""A simulator of the engine: the same planner and policies on a clock that only counts.

`load_profile` reads what is simulated, `simulate` runs one load of it, and `find_load`
scans loads for the one at which the SLO breaks. Nothing here needs jax.
"""

from jchameleon.sim.load import Load
from jchameleon.sim.profile import Profile, load_profile
from jchameleon.sim.run import simulate
from jchameleon.sim.sweep import find_load, parse_rates

__all__ = [
    "Load",
    "Profile",
    "find_load",
    "load_profile",
    "parse_rates",
    "simulate",
]
