"""Learning one step: options, networks and data made of them, saving and going on."""
