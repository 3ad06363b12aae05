"""One stage by itself: how it is built, what F, B, I, W and R do, and what they cost (torch)."""
