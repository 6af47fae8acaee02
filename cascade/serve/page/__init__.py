"""The page of `cascade serve`, in Gradio: thin, over what `cascade.serve` does."""
