"""The hub that joins core and device: one thread that plans, launches and settles steps, and its process."""
