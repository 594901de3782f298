"""What is measured about a network and its maps, and how it is summed up."""
