"""What the network is regressed on."""
