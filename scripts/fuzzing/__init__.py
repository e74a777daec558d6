"""What `scripts/fuzz.py` feeds with bytes, and how it changes them."""
