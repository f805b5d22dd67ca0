"""From a recipe and a model to a plan: rules become sites, sites become insertions, every check before any change.

For: what a rule matches (`matching`, `by_pattern`, `picking`), where a block hangs (`locating`), what forbids it
(`inplace_hazards`, `support`) and what it costs (`cost`). Not for: changing a model; a plan is frozen data.
"""
