"""How a network is trained: the state, the steps, what a configuration makes."""
