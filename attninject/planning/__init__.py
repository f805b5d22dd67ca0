"""From a recipe and a model to a plan: rules become spots, spots sites and locations, every check before any change.

For: what a rule matches (`matching`, `by_pattern`, `picking`), where a block hangs (`locating`, `sharing`), what it
sees there and is called (`layout_check`, `naming`), what forbids it (`inplace_hazards`, `support`), what it costs
(`cost`), and the blocks of a plan (`building`). Not for: changing a model; a plan is frozen data.
"""
