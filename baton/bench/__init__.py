"""The load generator behind `baton bench`: open loop, so that a slow server can't make its own load lighter.

    arrivals, traces, lengths, classes -> plan -> driver -> records -> metrics -> verdict, results, page

Everything but the driver and the probe is a pure function; what is drawn, is drawn from the seed.
"""
