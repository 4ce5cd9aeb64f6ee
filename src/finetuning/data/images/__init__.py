"""Images in training rows: where they are, how their tokens get into the text, and how a batch gets its pixels."""
