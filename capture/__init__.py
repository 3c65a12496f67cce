"""Capture: how a model becomes a Program.

``huggingface`` uses the transformers library's own extension points; ``module`` exports any ``nn.Module``.
Both trace one sequence with a symbolic number of tokens and yield a Program at ``Stage.ATEN``.
"""
