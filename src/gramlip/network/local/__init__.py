"""Local constants: on a box or in a ball of inputs. docs/local.md."""

from gramlip.network.local.columns import columns_norm
from gramlip.network.local.intervals import Region, region
from gramlip.network.local.jacobians import Around, Local, Results, derivative, restricted
from gramlip.network.local.regions import region_search

__all__ = ["Around", "Local", "Region", "Results", "columns_norm", "derivative", "region", "region_search", "restricted"]
