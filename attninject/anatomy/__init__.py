"""What a recorded run says of a network's structure: dataflow, token grids, residual adds, repeated units, places.

For: finding where things are, by what was computed and never by an architecture's name. Not for: looking at
a rule, or changing anything; what is found here is data. A new place is one function in `places`.
"""
