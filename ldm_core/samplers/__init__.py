"""Denoiser + grid -> x0, one short function each."""
