"""Constants on a set of inputs: intervals for every entry of every value, lines, and bounds of the Jacobian. docs/local.md."""

from gramlip.network.local.intervals import Region, region
from gramlip.network.local.jacobians import Around, derivative
from gramlip.network.local.restrict import Local, restricted

__all__ = ["Around", "Local", "Region", "derivative", "region", "restricted"]
