"""`finetuning watch`: a local page that shows runs while they train."""
