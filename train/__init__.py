"""Objectives, optimizer, sharding, train step, loop, checkpoints."""
