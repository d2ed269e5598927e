"""Denoiser -> denoiser."""
