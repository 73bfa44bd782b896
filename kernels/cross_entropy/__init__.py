"""Cross entropy of rows of logits, and its gradient written over them."""
