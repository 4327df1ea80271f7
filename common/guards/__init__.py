"""The old place of `guards`, which older cards and scripts name: `from common.guards import
load_guard`.
"""

from guards import Guard, load_guard

__all__ = ["Guard", "load_guard"]
