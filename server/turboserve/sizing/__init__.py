"""From measured speeds and counted bytes to machines: a model of steps, and of users who ask, read and think. Pure."""
