"""Training one step: options, the networks and data built from them, saving and resuming."""
