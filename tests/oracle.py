"""The oracle of the tests is the public one: see gramlip.testing."""

from gramlip.testing import matrix, oracle

__all__ = ["matrix", "oracle"]
