"""From shards to the network's input: which clips each step sees, and their packs.

``order`` shuffles the clips of an epoch, ``epoch`` and ``plan`` say which clips each step and each pack holds, ``pack``
builds its tensors, and ``loader`` feeds them to a rank.
"""
