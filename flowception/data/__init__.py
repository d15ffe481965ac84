"""Shards of latents, the plan of an epoch, and packs: everything between encoded clips and the network's input.

``schema`` says what a clip is, ``shards`` writes it, ``index`` and ``reader`` find and verify it, ``plan`` and
``packing`` decide which clips a step sees, ``pack`` builds tensors of them and ``loader`` feeds a rank.
"""
