"""The families of drawn calls by name."""

from tests.hardening.dropins import dropins
from tests.hardening.operators import OPERATORS, Call

FAMILIES = {**OPERATORS, "drop-ins": dropins()}

__all__ = ["FAMILIES", "Call"]
