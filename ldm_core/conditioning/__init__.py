"""What a network is conditioned on, and how conditions beside the caption reach it."""
