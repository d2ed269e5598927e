"""The optimiser step and what it needs: optimisers, EMA, draws, prefetch."""
