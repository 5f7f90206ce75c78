"""Which expert on which device, with copies of the busy ones: from a load to a placement.

A device computes for all who routed to its experts, and a layer is done when the busiest device is: so the busiest
device's load, beside the mean, is what an uneven placement costs.

placement   the value, and the bound below which no placement can be
eplb        DeepSeek's published balancing, with its interface and its results
search      ours: a load to a placement whose busiest device has as little as can be found
split       how the tokens of an expert are split between its copies so that the busiest device has least
topology    where devices stand, their room and their links
routes      which copy a token goes to; traffic: what devices send each other, counted
near        experts that are used together near each other
moving      what it takes to come from one placement to another, and when it pays
layer       all of it for every layer; load: the files that are read
"""

from handful.placement.eplb import rebalance_experts
from handful.placement.layer import Placed, PlacedModel, as_they_come, place_layer, place_layers
from handful.placement.load import read_load, read_placements, read_split, read_tokens
from handful.placement.moving import Moves, Payoff, moves, payoff
from handful.placement.near import near, sent
from handful.placement.placement import Placement, lower_bound
from handful.placement.routes import Routes, homes
from handful.placement.search import place
from handful.placement.split import shares
from handful.placement.topology import Link, Topology, parse_link, read_topology
from handful.placement.traffic import Crossings, Exchange, crossings, exchange

__all__ = [
    "Crossings", "Exchange", "Link", "Moves", "Payoff", "Placed", "PlacedModel", "Placement", "Routes", "Topology",
    "as_they_come", "crossings", "exchange", "homes", "lower_bound", "moves", "near", "parse_link", "payoff", "place",
    "place_layer", "place_layers", "read_load", "read_placements", "read_split", "read_tokens", "read_topology",
    "rebalance_experts", "sent", "shares",
]  # fmt: skip
