"""The load generator of `baton bench`: open loop, so that a slow server does not lighten its own load.

    arrivals, traces, lengths, classes -> plan -> driver -> records -> metrics -> verdict, results, page

All but the driver and the probe are pure functions; the seed decides on every random number.
"""
