"""What a model does, without a mark: one forward is run on stand-ins and recorded, and everything is put back.

For: records of calls, operations and shapes (`probe`), and what a run may disturb (`snapshot`). Not for: opinions
on what is found, and never for changing a model for good.
"""
