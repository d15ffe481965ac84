"""From shards to the network's input: the clips and packs of each step.

``order`` shuffles the clips of an epoch, ``epoch`` and ``plan`` assign clips to steps and packs, ``pack`` builds a
pack's tensors, and ``loader`` feeds packs to a rank.
"""
