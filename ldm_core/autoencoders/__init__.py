"""Pixels <-> latents: loading, losses, statistics, training."""
