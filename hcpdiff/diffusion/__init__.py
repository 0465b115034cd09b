"""What is learnt: the noise process, the target, and the weight of a timestep."""
