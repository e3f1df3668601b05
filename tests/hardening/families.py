"""Every family of drawn calls by its name."""

from tests.hardening.dropins import dropins
from tests.hardening.operators import OPERATORS, Call

FAMILIES = {**OPERATORS, "drop-ins": dropins()}

__all__ = ["FAMILIES", "Call"]
