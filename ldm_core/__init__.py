"""Latent diffusion in plain torch: usable alone, without Ray or MLflow."""
