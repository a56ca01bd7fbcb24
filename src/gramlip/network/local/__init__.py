"""Local constants: on a box or in a ball of inputs. docs/local.md."""

from gramlip.network.local.intervals import Region as Region
from gramlip.network.local.intervals import region as region
from gramlip.network.local.jacobians import Around as Around
from gramlip.network.local.jacobians import derivative as derivative
from gramlip.network.local.relaxations import restricted as restricted
