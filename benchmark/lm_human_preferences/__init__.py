"""Our scripts beside lm-human-preferences: recorded tensors (`compare`), curves over seeds (`run`, `plot`),
the recorded loop written a second time (`peer_policy`)."""
