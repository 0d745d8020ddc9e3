"""What a text knows about itself, how several share a model, and what one takes over from another."""
