"""How a module gets a new forward: its own graph traced and checked, edited, written as code, its class swapped.

For: local graphs (`tracer`, `faithfulness`), generated classes, where a block goes (`location`), and what injection
left behind (`injected_state`). Only `apply` changes a model's structure. Not for: deciding where a block belongs.
A block that runs twice, or never: `attninject/README.md` says where to look.
"""
