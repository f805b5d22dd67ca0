"""Evidence: where attention belongs in a model, and whether it helps there.

For: `rank_sites` and what it is made of (per-image gradients at the identity, the score test, the methods it is
compared with), and the data that studies of it run on; `sweep` and `report`: arms and their controls over seeds, and
what they show. Not for: how a run is trained, which is `training`'s, or changing a model that was given: every
measurement is made on a copy.

With identity gates a network with all candidate blocks in computes what it computed before: it is a null model.
The gradient at the parameters that are zero then says what a block would change first, without any training.
"""
