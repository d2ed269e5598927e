"""Networks: DiTs conditioned on text or labels, MMDiT, their layers, and diffusers' models."""
