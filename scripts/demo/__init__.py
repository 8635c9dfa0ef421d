"""What the demo model is made of: its text, tokenizer, network and exported folder."""
